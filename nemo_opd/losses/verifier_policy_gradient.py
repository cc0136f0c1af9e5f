"""Policy gradient on the verifier's reward."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_opd.losses.base import SampledTokenLoss
from nemo_opd.losses.registry import register_loss
from nemo_opd.types import Need, TeacherNeeds, TokenBatch
from nemo_opd.vocab.objective import Evaluation
from nemo_opd.vocab.support import FewLogProbs, Support
from nemo_opd.vocab.view import VocabView


@register_loss("verifier_policy_gradient")
class VerifierPolicyGradient(SampledTokenLoss):
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), A the verifier's advantage of the response that the token
    stands in, r = p(y) / mu(y) the importance ratio to what the sampler drew from.

    The token-level form of PPO (Schulman et al., arXiv 1707.06347, eq. 7) that GRPO uses (arXiv 2402.03300); with
    clip_high above clip_low, "clip-higher" (arXiv 2503.14476). A token counts where its response has an advantage and
    the sampler drew it; NaN stands for a missing one.

    Args:
        clip_low, clip_high: distances of the two bounds from 1; None: no such bound.
    """

    needs = TeacherNeeds(Need.NOTHING)
    zero_at_match = False

    def __init__(self, clip_low: float | None = None, clip_high: float | None = None) -> None:
        super().__init__()
        self._low = 0.0 if clip_low is None else 1.0 - clip_low
        self._high = torch.inf if clip_high is None else 1.0 + clip_high

    @property
    def metric_names(self) -> tuple[str, ...]:
        return (*super().metric_names, "reward_ratio_clipped")

    def counted(self, tokens: TokenBatch) -> Tensor:
        return tokens.advantage.isfinite() & tokens.sampler_logprobs.isfinite()

    def sampled_losses(self, logprobs: Tensor, tokens: TokenBatch, prepared: Tensor | None) -> dict[str, Tensor]:
        ratio, advantage = self._ratio_and_advantage(logprobs, tokens)
        return {self.name: -torch.minimum(ratio * advantage, ratio.clamp(self._low, self._high) * advantage)}

    def evaluate(
        self, student: VocabView, teacher: VocabView | None, tokens: TokenBatch, prepared: Tensor | None
    ) -> Evaluation:
        return self._evaluation(student.logprob(tokens.ids), tokens)

    def evaluate_few(
        self,
        student: FewLogProbs,
        teacher: FewLogProbs | None,
        support: Support | None,
        tokens: TokenBatch,
        prepared: Tensor | None,
    ) -> Evaluation:
        assert student.written is not None
        return self._evaluation(student.written, tokens)

    def _evaluation(self, logprobs: Tensor, tokens: TokenBatch) -> Evaluation:
        ratio, advantage = self._ratio_and_advantage(logprobs.detach(), tokens)
        clipped = ((ratio > self._high) & (advantage > 0)) | ((ratio < self._low) & (advantage < 0))
        return Evaluation(
            self.sampled_losses(logprobs, tokens, None),
            {"reward_ratio_clipped": (clipped.to(ratio.dtype), self.counted(tokens))},
        )

    def _ratio_and_advantage(self, logprobs: Tensor, tokens: TokenBatch) -> tuple[Tensor, Tensor]:
        """A token that does not count gets ratio 1 and advantage 0: NaN would spoil the gradient of those that do."""
        counted = self.counted(tokens)
        sampler = torch.where(counted, tokens.sampler_logprobs.to(logprobs.dtype), logprobs.detach())
        advantage = torch.where(counted, tokens.advantage.to(logprobs.dtype), 0.0)
        return (logprobs - sampler).exp(), advantage
