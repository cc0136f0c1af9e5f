"""On-policy distillation, exact form.

The student p writes y; at every position t of y the loss is the reverse KL divergence to the teacher q over the whole
vocabulary, differentiated:

    L = (1/N) sum_t KL(p(. | x, y_<t) || q(. | x, y_<t))          N = trained tokens of the step, over all processes

The gradient is exact per position. That of the sequence-level KL has a return-to-go term in addition, which is left
out here as in the source.

Source: Agarwal et al., On-Policy Distillation of Language Models (GKD), arXiv 2306.13649, with reverse KL and fully
on-policy data.
"""

from nemo_opd.algorithms.record import Algorithm
from nemo_opd.config import DefaultStop, ReverseKLLoss, SamePromptContext, StudentPrefix, UnitWeight

OPD = Algorithm(
    name="opd",
    source="arXiv 2306.13649, reverse KL on the student's own samples",
    slots={
        "prefix": StudentPrefix(),
        "stop": DefaultStop(),
        "context": SamePromptContext(),
        "loss": ReverseKLLoss(),
        "weight": UnitWeight(),
    },
)
