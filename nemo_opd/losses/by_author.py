"""One loss for the student's own tokens, another for those that a teacher or a data set wrote.

A token that the student did not draw is no sample of its policy: it never gets a policy gradient. What is done with it
is said by the `prefix` slot that put it there: a cross-entropy, or the same loss of distributions.
"""

from __future__ import annotations

from torch import Tensor

from nemo_opd.config import MixedPrefix, SlotConfig, TeacherPrefix
from nemo_opd.losses.base import DistillationLoss
from nemo_opd.losses.cross_entropy import CrossEntropy
from nemo_opd.types import Author, TeacherNeeds, TokenBatch
from nemo_opd.vocab.objective import Evaluation, Part, SampledScores
from nemo_opd.vocab.view import VocabView


class ByAuthor(DistillationLoss):
    """Losses that share the tokens of a row between them, each with its own components and global token counts."""

    name = "by_author"

    def __init__(self, student: Part, other: Part) -> None:
        super().__init__()
        self.parts = (student, other)
        self.zero_at_match = all(part.objective.zero_at_match for part in self.parts)

    @property
    def needs(self) -> TeacherNeeds:
        return max((part.objective.needs for part in self.parts), key=lambda needs: needs.need)

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(part.label + name for part in self.parts for name in part.objective.components)

    @property
    def metric_names(self) -> tuple[str, ...]:
        return tuple(part.label + name for part in self.parts for name in part.objective.metric_names)

    def component_masks(self, tokens: TokenBatch) -> dict[str, Tensor]:
        return {
            part.label + name: mask & part.members(tokens)
            for part in self.parts
            for name, mask in part.objective.component_masks(tokens).items()
        }

    def prepare(self, scores: SampledScores, tokens: TokenBatch) -> Tensor | None:
        return self.parts[0].objective.prepare(scores, tokens)

    def evaluate(
        self, student: VocabView, teacher: VocabView | None, tokens: TokenBatch, prepared: Tensor | None
    ) -> Evaluation:
        """All parts at every token, for calls as a module; the fused path asks each for its own tokens alone."""
        return Evaluation(
            {
                part.label + name: part.factor * loss
                for part in self.parts
                for name, loss in part.objective.evaluate(student, teacher, tokens, prepared).losses.items()
            }
        )


def for_prefix(loss: DistillationLoss, prefix: SlotConfig) -> DistillationLoss:
    """The loss of a run whose responses begin as the `prefix` slot says; the loss itself where the student, or the
    data set, writes everything."""
    if isinstance(prefix, TeacherPrefix):
        return _split(loss, prefix.loss, Author.TEACHER, 1.0, prefix.loss_weight)
    if isinstance(prefix, MixedPrefix):
        if prefix.loss_weight is not None:
            return _split(loss, prefix.loss, Author.DATASET, 1.0, prefix.loss_weight)
        return _split(loss, prefix.loss, Author.DATASET, prefix.on_policy_share, 1.0 - prefix.on_policy_share)
    return loss


def _split(loss: DistillationLoss, kind: str, author: Author, own: float, others: float) -> DistillationLoss:
    other = loss if kind == "same" else CrossEntropy()
    students = frozenset(Author) - {author}
    label = f"{author.name.lower()}_"
    return ByAuthor(Part(loss, students, own), Part(other, frozenset({author}), others, label, weighted=False))
