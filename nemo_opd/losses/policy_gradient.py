"""Policy gradient on the written token."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_opd.errors import ConfigError
from nemo_opd.losses.advantage import Advantage, as_advantage, shape_advantage
from nemo_opd.losses.base import SampledTokenLoss
from nemo_opd.losses.ratio import check_importance_ratio, importance_ratio
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

    Args:
        clip_ratio: c above; None multiplies by the plain ratio.
        importance_ratio: `sampler` as above, or `none`: w is 1 and its gradient grad log p(y), for use with an
            importance correction in the weight slot (which would otherwise be applied twice).
        advantage: name of an `Advantage`; a divergence of distributions is refused.
        advantage_clip, advantage_floor, discount, length_normalised: see `shape_advantage`.
    """

    needs = TeacherNeeds(Need.SAMPLED)

    def __init__(
        self,
        clip_ratio: float | None = None,
        importance_ratio: str = "sampler",
        advantage: str | Advantage = "sampled_reverse_kl",
        advantage_clip: float | None = None,
        advantage_floor: float | None = None,
        discount: float = 0.0,
        length_normalised: bool = False,
    ) -> None:
        super().__init__()
        _check(clip_ratio, importance_ratio, advantage_clip, advantage_floor, discount, length_normalised)
        self.advantage = as_advantage(advantage)
        self.clip_ratio, self.importance_ratio = clip_ratio, importance_ratio
        self.advantage_clip, self.advantage_floor = advantage_clip, advantage_floor
        self.discount, self.length_normalised = discount, length_normalised
        self.whole_row = discount > 0.0

    def counted(self, tokens: TokenBatch) -> Tensor:
        return super().counted(tokens) & tokens.sampler_logprobs.isfinite()

    def prepare(self, scores: SampledScores, tokens: TokenBatch) -> Tensor:
        return shape_advantage(
            self.advantage.values(scores, tokens),
            self.counted(tokens),
            tokens,
            self.advantage_clip,
            self.advantage_floor,
            self.discount,
            self.length_normalised,
        )

    def sampled_losses(self, logprobs: Tensor, tokens: TokenBatch, prepared: Tensor | None) -> dict[str, Tensor]:
        assert prepared is not None
        ratio = importance_ratio(logprobs, tokens, self.importance_ratio)
        gain = ratio * prepared
        if self.clip_ratio is not None:
            clipped = ratio.clamp(1.0 - self.clip_ratio, 1.0 + self.clip_ratio) * prepared
            gain = torch.minimum(gain, clipped)
        return {self.name: -gain}


def _check(
    clip_ratio: float | None,
    ratio: str,
    advantage_clip: float | None,
    advantage_floor: float | None,
    discount: float,
    length_normalised: bool,
) -> None:
    if clip_ratio is not None and not 0.0 < clip_ratio < 1.0:
        raise ConfigError(
            "loss.clip_ratio", clip_ratio, "a number between 0 and 1, or null", "0.2 is PPO's; null never clips"
        )
    check_importance_ratio(ratio)
    if clip_ratio is not None and ratio == "none":
        raise ConfigError(
            "loss.clip_ratio", clip_ratio, "null with importance_ratio=none", "there is no ratio to clip without one"
        )
    if advantage_clip is not None and advantage_clip <= 0.0:
        raise ConfigError("loss.advantage_clip", advantage_clip, "a positive number, or null", "null never clips")
    if advantage_floor is not None and not 0.0 < advantage_floor < 1.0:
        raise ConfigError(
            "loss.advantage_floor", advantage_floor, "a number between 0 and 1, or null", "REOPOLD uses about 0.2"
        )
    if not 0.0 <= discount <= 1.0:
        raise ConfigError("loss.discount", discount, "a number from 0 to 1", "0 is the token's own advantage alone")
    if length_normalised and discount == 0.0:
        raise ConfigError(
            "loss.length_normalised", True, "false with discount=0", "only a return (discount above 0) has a length"
        )
