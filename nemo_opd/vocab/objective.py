"""What the fused path asks of a loss and of a token weight, and what it tells them.

`nemo_opd.losses` implements these protocols; nothing here knows a loss by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nemo_opd.types import Author, TeacherNeeds, TokenBatch
from nemo_opd.vocab.support import FewLogProbs, FewNumbers, Support
from nemo_opd.vocab.view import VocabView


@dataclass(frozen=True)
class SampledScores:
    """What both models say of the written tokens, as constants. What is not known is None, never a number."""

    student: Float[Tensor, " tokens"]
    """log p, of the trainer (not of the engine that sampled)"""
    teacher: Float[Tensor, " tokens"] | None = None
    """log q"""
    student_entropy: Float[Tensor, " tokens"] | None = None
    teacher_entropy: Float[Tensor, " tokens"] | None = None

    def select(self, rows: Tensor | slice) -> SampledScores:
        """The same restricted to some tokens."""
        return SampledScores(*(None if t is None else t[rows] for t in vars(self).values()))  # type: ignore[arg-type]


KINDS = ("reverse", "forward", "jsd", "skew_forward", "skew_reverse")


@dataclass(frozen=True)
class FullDivergence:
    """Names a divergence over the whole vocabulary (`nemo_opd.vocab.divergence` computes it)."""

    kind: str
    """One of `KINDS`."""
    mix: float = 0.0
    """b of jsd, a of the skew divergences, between 0 and 1"""

    def __post_init__(self) -> None:
        assert self.kind in KINDS and (not self.mixes or 0.0 < self.mix < 1.0)

    @property
    def mixes(self) -> bool:
        return self.kind in ("jsd", "skew_forward", "skew_reverse")

    @property
    def teacher_share(self) -> float:
        """Weight of the teacher in the mixture."""
        return 1.0 - self.mix if self.kind == "skew_reverse" else self.mix


@dataclass(frozen=True)
class Evaluation:
    """A loss at each token of a chunk."""

    losses: Mapping[str, Float[Tensor, " tokens"]]
    """By component, in nats, before weight and normaliser; differentiable with respect to the student's view."""
    metrics: Mapping[str, tuple[Float[Tensor, " tokens"], Bool[Tensor, " tokens"]]] = field(default_factory=dict)
    """By name: detached values, and the tokens on which they count."""


@runtime_checkable
class Objective(Protocol):
    """A loss, as `nemo_opd.losses.DistillationLoss` implements it.

    At most one of `divergence` and `few` is set; it names a hand-written backward that computes the same as `evaluate`.
    """

    divergence: FullDivergence | None
    few: FewNumbers | None
    needs: TeacherNeeds
    zero_at_match: bool
    beside: Objective | None
    """A loss of the written token alone that is part of this one. Its components come after the divergence's."""
    components: tuple[str, ...]
    coefficients: Mapping[str, float]
    """Factor on a component's loss, where it is not 1."""
    unweighted: frozenset[str]
    """Components that a `Weighting` leaves alone."""
    parts: tuple[Part, ...]
    """Losses that share the tokens of a row between them; if there are any, nothing else here is asked."""
    metric_names: tuple[str, ...]
    """Every metric that `evaluate` and `token_metrics` can report, so that a rank without tokens has the same names."""
    whole_row: bool
    """Must `prepare` see all the tokens of a row at once (returns, sequence lengths)? Costs one more forward pass
    through the output layers."""

    def component_masks(self, tokens: TokenBatch) -> dict[str, Tensor]:
        """bool [tokens] per component: the tokens that it counts."""

    def token_metrics(self, tokens: TokenBatch) -> Mapping[str, tuple[Tensor, Tensor]]:
        """What can be said of a row before any score is computed (missing and zero teacher scores)."""

    def prepare(self, scores: SampledScores, tokens: TokenBatch) -> Tensor | None:
        """A constant per token, from the scores of a chunk (or of a whole row, if `whole_row`)."""

    def evaluate(
        self, student: VocabView, teacher: VocabView | None, tokens: TokenBatch, prepared: Tensor | None
    ) -> Evaluation:
        """The loss of a chunk."""

    def evaluate_few(
        self,
        student: FewLogProbs,
        teacher: FewLogProbs | None,
        support: Support | None,
        tokens: TokenBatch,
        prepared: Tensor | None,
    ) -> Evaluation:
        """The loss of a chunk from a few log-probabilities per token; called only where `few` is set."""


@runtime_checkable
class Weighting(Protocol):
    """Constant factors on tokens, as `nemo_opd.losses.TokenWeight` implements it."""

    metric_names: tuple[str, ...]
    whole_row: bool
    """Do the factors depend on more than the token itself?"""

    def factors(self, scores: SampledScores, tokens: TokenBatch) -> tuple[Tensor, Mapping[str, tuple[Tensor, Tensor]]]:
        """Factor [tokens] and metrics (values and the tokens on which they count)."""


@dataclass(frozen=True)
class Part:
    """A loss on the tokens of some authors, in an objective that treats authors differently."""

    objective: Objective
    authors: frozenset[Author]
    factor: float = 1.0
    """On its loss; not on its token count."""
    label: str = ""
    """Put before the names of its components and metrics."""
    weighted: bool = True
    """Does the weight slot apply to it?"""

    def members(self, tokens: TokenBatch) -> Tensor:
        """bool [tokens]: whose loss this is."""
        found = torch.zeros_like(tokens.teacher_valid)
        for author in self.authors:
            found |= tokens.author == int(author)
        return found

    def weighting(self, weight: Weighting | None) -> Weighting | None:
        """The weight slot's factors times `factor`."""
        weight = weight if self.weighted else None
        return weight if self.factor == 1.0 else ScaledWeighting(weight, self.factor)


class ScaledWeighting:
    """A `Weighting` times a number; its metrics are those of the weighting itself."""

    def __init__(self, weight: Weighting | None, factor: float) -> None:
        self._weight, self._factor = weight, factor
        self.metric_names: tuple[str, ...] = () if weight is None else weight.metric_names
        self.whole_row = weight is not None and weight.whole_row

    def factors(self, scores: SampledScores, tokens: TokenBatch) -> tuple[Tensor, Mapping[str, tuple[Tensor, Tensor]]]:
        if self._weight is None:
            return torch.full_like(scores.student, self._factor), {}
        factors, metrics = self._weight.factors(scores, tokens)
        return self._factor * factors, metrics
