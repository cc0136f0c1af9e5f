"""Entropy-aware on-policy distillation.

Plain on-policy distillation on sampled tokens, and the forward KL on the teacher's 16 most probable ids where the
teacher's entropy is above 0.8 nats:

    L = (1/N) sum_t [ -w_t sg[log q(y_t) - log p(y_t)] + 1[H(q_t) > 0.8] KL_16(q_t || p_t) ]

Reverse KL picks one of several good continuations; the second term keeps the student's mass on all of them. What the
forward KL makes of the ids outside its 16 (one more bucket) is a reconstruction.

Source: Jin et al., arXiv 2603.07079.
"""

from nemo_opd.algorithms.record import Algorithm
from nemo_opd.config import EntropyAwareLoss

ENTROPY_AWARE_OPD = Algorithm(
    name="entropy_aware_opd",
    source="arXiv 2603.07079, forward KL besides where the teacher's entropy is high",
    slots={"loss": EntropyAwareLoss()},
)
