"""Skew KL divergences over the whole vocabulary."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nemo_opd.errors import ConfigError
from nemo_opd.losses.base import DistributionLoss
from nemo_opd.losses.registry import register_loss
from nemo_opd.types import Need, TeacherNeeds, TokenBatch
from nemo_opd.vocab.objective import FullDivergence
from nemo_opd.vocab.view import VocabView


class _SkewKL(DistributionLoss):
    needs = TeacherNeeds(Need.FULL)
    kind: str

    def __init__(self, alpha: float = 0.1) -> None:
        super().__init__()
        if not 0.0 < alpha < 1.0:
            raise ConfigError("loss.alpha", alpha, "a number between 0 and 1", "DistiLLM uses at most 0.1")
        self.divergence = FullDivergence(self.kind, alpha)
        self.log_alpha, self.log_rest = math.log(alpha), math.log1p(-alpha)

    def over_mixture(self, log_main: Tensor, log_mixed_in: Tensor) -> Tensor:
        """log of main / (alpha main + (1 - alpha) mixed_in)"""
        return log_main - torch.logaddexp(log_main + self.log_alpha, log_mixed_in + self.log_rest)


@register_loss("skew_forward_kl")
class SkewForwardKL(_SkewKL):
    """KL(q || a q + (1 - a) p): forward KL whose gradient stays bounded where p is small (DistiLLM, arXiv
    2402.03898)."""

    kind = "skew_forward"

    def token_losses(self, student: VocabView, teacher: VocabView, tokens: TokenBatch) -> dict[str, Tensor]:
        return {self.name: teacher.expectation(self.over_mixture, student)}


@register_loss("skew_reverse_kl")
class SkewReverseKL(_SkewKL):
    """KL(p || (1 - a) q + a sg[p]): reverse KL whose target never vanishes where p is large (DistiLLM-2, arXiv
    2503.07067). The student inside the mixture is a constant."""

    kind = "skew_reverse"

    def token_losses(self, student: VocabView, teacher: VocabView, tokens: TokenBatch) -> dict[str, Tensor]:
        def over_mixture(log_p: Tensor, log_q: Tensor) -> Tensor:
            return log_p - torch.logaddexp(log_p.detach() + self.log_alpha, log_q + self.log_rest)

        return {self.name: student.expectation(over_mixture, teacher)}
