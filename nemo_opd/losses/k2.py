"""Half the squared log-ratio of the sampled token."""

from __future__ import annotations

from torch import Tensor

from nemo_opd.losses.base import SampledTokenLoss
from nemo_opd.losses.registry import register_loss
from nemo_opd.types import Need, TeacherNeeds, TokenBatch
from nemo_opd.vocab.objective import SampledScores


@register_loss("k2")
class K2(SampledTokenLoss):
    """(log p(y) - log q(y))^2 / 2: for y ~ p its expected gradient is that of KL(p || q).

    (Back-propagating through k1 = log p - log q gives an expected gradient of 0, through k3 = q/p - 1 + log p - log q
    that of the forward KL: neither is offered.)
    """

    needs = TeacherNeeds(Need.SAMPLED)

    def prepare(self, scores: SampledScores, tokens: TokenBatch) -> Tensor:
        assert scores.teacher is not None
        return scores.teacher

    def sampled_losses(self, logprobs: Tensor, tokens: TokenBatch, prepared: Tensor | None) -> dict[str, Tensor]:
        assert prepared is not None
        return {self.name: 0.5 * (logprobs - prepared).square()}
