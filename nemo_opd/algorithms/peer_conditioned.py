"""Peer-conditioned self-distillation: the teacher reads what other rollouts of the group got right and wrong.

For rollout i of a prompt's G rollouts, C_i holds two successes and one failure among the others (by the verifier):

    L = (1/N) sum_i sum_t min(r_it, 2) D(p(. | x, y_i,<t), sg[q(. | x + C_i, y_i,<t)])

D is the divergence of the distributions on the student's 100 best ids and the rest: generalised JSD with beta 1/2, or
reverse KL for mathematics (`loss.divergence=reverse`). q is the moving average of the student's own weights (0.95),
r the importance ratio of trainer over sampler, a constant. A rollout without a usable peer has no teacher and is
counted (`tokens/without_context`). What the 100 ids are the best of is a reconstruction: the student's.

Source: multi-rollout on-policy distillation, arXiv 2605.12652 (its own short name, MOPD, means multi-teacher
elsewhere). Its settings: G = 8, 32 prompts a step, learning rate 1e-5.
"""

from nemo_opd.algorithms.record import Algorithm
from nemo_opd.config import PeersContext, TailLoss, TruncatedImportanceWeight

PEER_CONDITIONED = Algorithm(
    name="peer_conditioned",
    source="arXiv 2605.12652, contrastive peers before an averaged self teacher",
    slots={
        "context": PeersContext(variant="contrastive", successes=2, failures=1, max_tokens=10240),
        "loss": TailLoss(k=100, support="student", divergence="jsd", beta=0.5),
        "weight": TruncatedImportanceWeight(clamp=2.0),
    },
    settings={
        "teacher.source": "ema",
        "teacher.decay": 0.95,
        "rollout.samples_per_prompt": 8,
        "train.prompts_per_step": 32,
        "optimizer.lr": 1e-5,
    },
)
