"""Reverse KL over the whole vocabulary."""

from __future__ import annotations

from torch import Tensor

from nemo_opd.losses.base import DistributionLoss
from nemo_opd.losses.registry import register_loss
from nemo_opd.types import Need, TeacherNeeds, TokenBatch
from nemo_opd.vocab.objective import FullDivergence
from nemo_opd.vocab.view import VocabView


@register_loss("reverse_kl")
class ReverseKL(DistributionLoss):
    """KL(p || q) = sum_v p_v (log p_v - log q_v), p the student: plain on-policy distillation, exact at a position.

    The gradient of the sequence-level KL has a return-to-go term in addition (later positions depend on this token).
    """

    needs = TeacherNeeds(Need.FULL)
    divergence = FullDivergence("reverse")

    def token_losses(self, student: VocabView, teacher: VocabView, tokens: TokenBatch) -> dict[str, Tensor]:
        return {self.name: student.expectation(lambda log_p, log_q: log_p - log_q, teacher)}
