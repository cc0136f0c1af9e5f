"""Losses that look at a few log-probabilities per token: of a support, of what is outside, of the written token."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_opd.losses.base import DistributionLoss
from nemo_opd.types import TokenBatch
from nemo_opd.vocab.objective import Evaluation
from nemo_opd.vocab.support import FewLogProbs, few_of_view, support_of_views
from nemo_opd.vocab.view import VocabView


class FewNumbersLoss(DistributionLoss):
    """Sets `few` and writes `evaluate_few`; on views the same numbers are asked of the views."""

    def evaluate(
        self, student: VocabView, teacher: VocabView | None, tokens: TokenBatch, prepared: Tensor | None
    ) -> Evaluation:
        assert teacher is not None and self.few is not None
        support = None
        if self.few.choice != "none":
            support = support_of_views(self.few, student.detach(), teacher, tokens.teacher_ids)
        few_p = few_of_view(student, self.few, support, tokens.ids)
        few_q = few_of_view(teacher, self.few, support, tokens.ids)
        return self.evaluate_few(few_p, few_q, support, tokens, prepared)


def forward_kl_on(student: FewLogProbs, teacher: FewLogProbs) -> Tensor:
    """sum over the ids of q (log q - log p), and the same of the mass outside where it is there; [tokens]."""
    assert student.at_ids is not None and teacher.at_ids is not None
    total = (teacher.at_ids.exp() * (teacher.at_ids - student.at_ids)).sum(1)
    if student.tail is None or teacher.tail is None:
        return total
    rest = student.tail.isfinite() & teacher.tail.isfinite()  # no tail where the ids are the whole vocabulary
    p_tail, q_tail = torch.where(rest, student.tail, 0.0), torch.where(rest, teacher.tail, 0.0)
    return total + torch.where(rest, q_tail.exp() * (q_tail - p_tail), 0.0)
