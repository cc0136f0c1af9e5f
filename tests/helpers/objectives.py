"""The smallest losses on the vocabulary view, for tests of what is around a loss."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_opd.types import Need, TeacherNeeds, TokenBatch
from nemo_opd.vocab.objective import Evaluation, SampledScores
from nemo_opd.vocab.view import VocabView


class _PerToken:
    metric_names: tuple[str, ...] = ()
    whole_row = False
    components: tuple[str, ...] = ()

    def component_masks(self, tokens: TokenBatch) -> dict[str, Tensor]:
        return dict.fromkeys(self.components, tokens.teacher_valid)

    def token_metrics(self, tokens: TokenBatch) -> dict[str, tuple[Tensor, Tensor]]:
        return {}

    def prepare(self, scores: SampledScores, tokens: TokenBatch) -> Tensor | None:
        return None


class CrossEntropy(_PerToken):
    """-log p of the written token."""

    needs = TeacherNeeds(Need.NOTHING)
    components = ("cross_entropy",)

    def evaluate(
        self, student: VocabView, teacher: VocabView | None, tokens: TokenBatch, prepared: Tensor | None
    ) -> Evaluation:
        return Evaluation({"cross_entropy": -student.logprob(tokens.ids)})


class ReverseKLAndEvenCrossEntropy(_PerToken):
    """KL(p || q) on every token, and -log p on the tokens with an even id: two components with counts of their own."""

    needs = TeacherNeeds(Need.FULL)
    components = ("kl", "even")

    def component_masks(self, tokens: TokenBatch) -> dict[str, Tensor]:
        return {"kl": tokens.teacher_valid, "even": tokens.ids % 2 == 0}

    def evaluate(
        self, student: VocabView, teacher: VocabView | None, tokens: TokenBatch, prepared: Tensor | None
    ) -> Evaluation:
        assert teacher is not None
        return Evaluation(
            {
                "kl": student.expectation(torch.sub, teacher),
                "even": -student.logprob(tokens.ids),
            }
        )
