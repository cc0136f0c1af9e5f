"""Forward KL over the whole vocabulary."""

from __future__ import annotations

from torch import Tensor

from nemo_opd.losses.base import DistributionLoss
from nemo_opd.losses.registry import register_loss
from nemo_opd.types import Need, TeacherNeeds, TokenBatch
from nemo_opd.vocab.objective import FullDivergence
from nemo_opd.vocab.view import VocabView


@register_loss("forward_kl")
class ForwardKL(DistributionLoss):
    """KL(q || p) = sum_v q_v (log q_v - log p_v), q the teacher: mass-covering; classical distillation."""

    needs = TeacherNeeds(Need.FULL)
    divergence = FullDivergence("forward")

    def token_losses(self, student: VocabView, teacher: VocabView, tokens: TokenBatch) -> dict[str, Tensor]:
        return {self.name: teacher.expectation(lambda log_q, log_p: log_q - log_p, student)}
