"""Policy gradient on the written token."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_opd.errors import ConfigError
from nemo_opd.losses.base import SampledTokenLoss
from nemo_opd.losses.registry import register_loss
from nemo_opd.types import Need, TeacherNeeds, TokenBatch
from nemo_opd.vocab.objective import SampledScores


@register_loss("policy_gradient")
class PolicyGradient(SampledTokenLoss):
    """-A w(y), advantage A = sg[log q(y) - log p(y)], importance ratio w = p(y) / sampler's probability of y.

    With y ~ p the expected gradient is that of KL(p || q). The student's log-probability in A is the trainer's, not
    the sampler's: noise of the sampler there biases the gradient even under exact ratios. With `clip_ratio` c the loss
    is PPO's ``-min(w A, clip(w, 1 - c, 1 + c) A)`` (Schulman et al., arXiv 1707.06347, eq. 7). Tokens that the sampler
    did not draw (no `sampler_logprobs`) have no ratio and are not counted.
    """

    needs = TeacherNeeds(Need.SAMPLED)

    def __init__(self, clip_ratio: float | None = None) -> None:
        super().__init__()
        if clip_ratio is not None and not 0.0 < clip_ratio < 1.0:
            raise ConfigError(
                "loss.clip_ratio", clip_ratio, "a number between 0 and 1, or null", "0.2 is PPO's; null never clips"
            )
        self.clip_ratio = clip_ratio

    def counted(self, tokens: TokenBatch) -> Tensor:
        return super().counted(tokens) & tokens.sampler_logprobs.isfinite()

    def prepare(self, scores: SampledScores, tokens: TokenBatch) -> Tensor:
        assert scores.teacher is not None
        return scores.teacher - scores.student

    def sampled_losses(self, logprobs: Tensor, tokens: TokenBatch, prepared: Tensor | None) -> dict[str, Tensor]:
        assert prepared is not None
        sampler = torch.where(tokens.sampler_logprobs.isfinite(), tokens.sampler_logprobs, logprobs.detach())
        ratio = (logprobs - sampler).exp()
        gain = ratio * prepared
        if self.clip_ratio is not None:
            clipped = ratio.clamp(1.0 - self.clip_ratio, 1.0 + self.clip_ratio) * prepared
            gain = torch.minimum(gain, clipped)
        return {self.name: -gain}
