"""Generalised Jensen-Shannon divergence over the whole vocabulary."""

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


@register_loss("jsd")
class GeneralisedJSD(DistributionLoss):
    """b KL(q || m) + (1 - b) KL(p || m), m = b q + (1 - b) p (GKD, Agarwal et al., arXiv 2306.13649).

    Its value tends to 0 at both ends while D_b / b tends to forward and D_b / (1 - b) to reverse KL; the endpoints are
    defined as these limits: beta 0 *is* forward KL, beta 1 *is* reverse KL.
    """

    needs = TeacherNeeds(Need.FULL)

    def __init__(self, beta: float = 0.5) -> None:
        super().__init__()
        if not 0.0 <= beta <= 1.0:
            raise ConfigError("loss.beta", beta, "a number from 0 (forward KL) to 1 (reverse KL)", "0.5 is symmetric")
        self.beta = beta
        endpoint = {0.0: FullDivergence("forward"), 1.0: FullDivergence("reverse")}
        self.divergence = endpoint.get(beta) or FullDivergence("jsd", beta)

    def token_losses(self, student: VocabView, teacher: VocabView, tokens: TokenBatch) -> dict[str, Tensor]:
        if self.beta in (0.0, 1.0):
            first, second = (teacher, student) if self.beta == 0.0 else (student, teacher)
            return {self.name: first.expectation(lambda log_a, log_b: log_a - log_b, second)}
        log_b, log_rest = math.log(self.beta), math.log1p(-self.beta)

        def over_mixture(log_p: Tensor, log_q: Tensor) -> Tensor:
            return log_p - torch.logaddexp(log_q + log_b, log_p + log_rest)

        def teacher_over_mixture(log_q: Tensor, log_p: Tensor) -> Tensor:
            return log_q - torch.logaddexp(log_q + log_b, log_p + log_rest)

        to_teacher = teacher.expectation(teacher_over_mixture, student)
        to_student = student.expectation(over_mixture, teacher)
        return {self.name: self.beta * to_teacher + (1.0 - self.beta) * to_student}
