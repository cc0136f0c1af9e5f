"""REOPOLD: relaxed on-policy distillation.

The policy-gradient form with two relaxations: the advantage has a floor, so that a token which the teacher finds
absurd is not pushed down without bound, and only tokens at which the student is undecided are trained on:

    A_t = max(sg[log q(y_t) - log p(y_t)], log(l / (1 - l))),   l = 0.2
    w_t = n/m for the m tokens of the response (a share of its n) with the highest entropy of the student, 0 for others

The share (one half) and the ranking within a response are reconstructions; the paper's schedule from exploration to
refinement, which changes these rules during training, is left out.

Source: Ko et al., arXiv 2603.11137.
"""

from nemo_opd.algorithms.record import Algorithm
from nemo_opd.config import EntropyWeight, PolicyGradientLoss

REOPOLD = Algorithm(
    name="reopold",
    source="arXiv 2603.11137, floored advantages on tokens of high entropy",
    slots={"loss": PolicyGradientLoss(advantage_floor=0.2), "weight": EntropyWeight(keep=0.5)},
)
