"""ExOPD: on-policy distillation with reward extrapolation.

A teacher q that was trained from a base model b by reinforcement learning has the reward log(q/b), up to a scale. The
student maximises it l times, against the distance from the base:

    A_t = -[(log p(y_t) - log b(y_t)) - l (log q(y_t) - log b(y_t))],   l = 1.25

l = 1 is plain on-policy distillation. Where the teacher's entropy is below 0.1 nats, l is capped at 1; that bound is a
reconstruction (`loss.low_entropy=null` never caps, and then the teacher need not answer its whole distribution). The
base is named by `teacher.base_model` and scores beside the teacher, in its layout.

Source: Yang et al., arXiv 2602.12125.
"""

from nemo_opd.algorithms.record import Algorithm
from nemo_opd.config import ExtrapolatedLoss

EXTRAPOLATED_OPD = Algorithm(
    name="extrapolated_opd",
    source="arXiv 2602.12125, the teacher's own reward times 1.25",
    slots={"loss": ExtrapolatedLoss(extrapolation=1.25, low_entropy=0.1)},
)
