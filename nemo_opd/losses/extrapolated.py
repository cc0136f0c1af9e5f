"""Policy gradient beyond the teacher: what the teacher's training changed, more of it (arXiv 2602.12125)."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_opd.errors import ConfigError
from nemo_opd.losses.advantage import Advantage
from nemo_opd.losses.policy_gradient import PolicyGradient
from nemo_opd.losses.registry import register_loss
from nemo_opd.types import Need, TeacherNeeds, TokenBatch
from nemo_opd.vocab.objective import SampledScores


class Extrapolated(Advantage):
    """-[(log p - log b) - l (log q - log b)]: the reward log(q/b) of the teacher's own training, times l, against the
    distance from its base b. l = 1 is plain on-policy distillation, whatever b.

    With `low_entropy`, l is at most 1 where the teacher's entropy is below it: a teacher that is sure of a token there
    leaves nothing to extrapolate, and log(q/b) is at its noisiest.
    """

    def __init__(self, extrapolation: float, low_entropy: float | None) -> None:
        self.extrapolation, self.low_entropy = extrapolation, low_entropy

    def values(self, scores: SampledScores, tokens: TokenBatch) -> Tensor:
        assert scores.teacher is not None and tokens.teacher_base_logprobs is not None
        base = tokens.teacher_base_logprobs.to(scores.student.dtype)
        factor = torch.full_like(scores.student, self.extrapolation)
        if self.low_entropy is not None:
            assert scores.teacher_entropy is not None
            factor = torch.where(scores.teacher_entropy < self.low_entropy, factor.clamp(max=1.0), factor)
        return factor * (scores.teacher - base) - (scores.student - base)


@register_loss("extrapolated")
class ExtrapolatedPolicyGradient(PolicyGradient):
    """`policy_gradient` on the advantage above; its expected gradient is that of KL(p || q^l b^(1-l) / Z).

    Not zero where student and teacher agree, unless l is 1: there the student goes on, away from the base.

    Args:
        extrapolation: l.
        low_entropy: nats; None never caps l. With it the teacher must answer its whole distribution.
        clip_ratio, importance_ratio, advantage_clip: of `PolicyGradient`.
    """

    def __init__(
        self,
        extrapolation: float = 1.25,
        low_entropy: float | None = None,
        clip_ratio: float | None = None,
        importance_ratio: str = "sampler",
        advantage_clip: float | None = None,
    ) -> None:
        if extrapolation <= 0.0:
            raise ConfigError("loss.extrapolation", extrapolation, "a positive number", "1.25 is the paper's")
        if low_entropy is not None and low_entropy < 0.0:
            raise ConfigError("loss.low_entropy", low_entropy, "at least 0 nats, or null", "null never caps")
        super().__init__(
            clip_ratio, importance_ratio, Extrapolated(extrapolation, low_entropy), advantage_clip=advantage_clip
        )
        self.needs = TeacherNeeds(Need.SAMPLED if low_entropy is None else Need.FULL, base=True)
        self.zero_at_match = extrapolation == 1.0
