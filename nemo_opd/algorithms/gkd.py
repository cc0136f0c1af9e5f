"""Generalised knowledge distillation, GKD.

A share lambda of the prompts is answered by the student, the others keep the response of the data set; both get the
generalised Jensen-Shannon divergence to the teacher over the whole vocabulary,

    L = lambda mean over the student's tokens of D_b(q || p) + (1 - lambda) mean over the data set's of D_b(q || p)
    D_b(q || p) = b KL(q || m) + (1 - b) KL(p || m),   m = b q + (1 - b) p

Each mean has its own global token count. lambda 1 is on-policy distillation, lambda 0 supervised distillation; b 0 is
forward and b 1 reverse KL (the limits of D_b / b and D_b / (1 - b)). `prefix.loss=cross_entropy` with a
`prefix.loss_weight` mixes supervised fine-tuning into any on-policy objective instead.

Source: Agarwal et al., arXiv 2306.13649, equations 2 to 4. The paper draws one number per batch and trains it on one
kind of data; here each prompt is drawn by itself, which has the same mean.
"""

from nemo_opd.algorithms.record import Algorithm
from nemo_opd.config import JSDLoss, MixedPrefix

GKD = Algorithm(
    name="gkd",
    source="arXiv 2306.13649, generalised JSD on a mixture of the student's and the data set's responses",
    slots={"prefix": MixedPrefix(on_policy_share=0.5), "loss": JSDLoss(beta=0.5)},
)
