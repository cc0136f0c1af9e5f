"""Cross-entropy on written tokens."""

from __future__ import annotations

from torch import Tensor

from nemo_opd.losses.base import SampledTokenLoss
from nemo_opd.losses.registry import register_loss
from nemo_opd.types import Need, TeacherNeeds, TokenBatch


@register_loss("cross_entropy")
class CrossEntropy(SampledTokenLoss):
    """-log p(y): supervised fine-tuning. Needs no teacher; is not zero where student and teacher agree."""

    needs = TeacherNeeds(Need.NOTHING)
    zero_at_match = False

    def sampled_losses(self, logprobs: Tensor, tokens: TokenBatch, prepared: Tensor | None) -> dict[str, Tensor]:
        return {self.name: -logprobs}
