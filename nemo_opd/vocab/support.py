"""A set of ids per token on which a loss looks at both distributions, and how it is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_opd.vocab.partial import PartialView
from nemo_opd.vocab.view import VocabView

CHOICES = ("none", "student", "teacher", "union", "intersection", "served", "student_in_served")
"""Whose ids: nobody's, the student's top-k, the teacher's, either's, both's, those that a served teacher scored, or
those of the student's top-k that a served teacher scored."""


@dataclass(frozen=True)
class Support:
    """A set of distinct ids per token."""

    ids: Tensor
    """int64 [tokens, k]"""
    mask: Tensor
    """bool [tokens, k], False where the entry is not in the set (a duplicate of a union, a stranger to an
    intersection); nothing is read from or written to such an entry"""


@dataclass(frozen=True)
class FewNumbers:
    """What a loss of few numbers per token looks at (`nemo_opd.vocab.reduced` computes these losses)."""

    choice: str = "none"
    """One of `CHOICES`."""
    k: int = 0
    tail: bool = False
    """Does it look at the mass outside the support?"""

    def __post_init__(self) -> None:
        assert self.choice in CHOICES and not (self.tail and self.choice == "none")

    @property
    def rankings(self) -> tuple[str, ...]:
        """Models whose top-k must be found."""
        if self.choice in ("student", "student_in_served"):
            return ("student",)
        if self.choice == "teacher":
            return ("teacher",)
        return ("student", "teacher") if self.choice in ("union", "intersection") else ()


@dataclass(frozen=True)
class FewLogProbs:
    """The few log-probabilities of one model; what a loss does not look at (or nobody served) is None."""

    at_ids: Tensor | None
    """[tokens, k] on the support; anything where its mask is False"""
    tail: Tensor | None
    """[tokens] log of the mass outside the support; -inf where nothing is outside"""
    written: Tensor | None
    """[tokens] of the written token"""

    def as_leaves(self, gradient: bool) -> FewLogProbs:
        """The same numbers as inputs of a new graph."""
        return FewLogProbs(*(t if t is None else t.detach().requires_grad_(gradient) for t in self._fields()))

    def gradients(self, total: Tensor) -> FewLogProbs:
        """Gradient of a scalar with respect to each; 0 where it does not depend on it."""
        leaves = [t for t in self._fields() if t is not None]
        if not total.requires_grad:
            return FewLogProbs(*(t if t is None else torch.zeros_like(t) for t in self._fields()))
        found = iter(torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True))
        return FewLogProbs(*(t if t is None else next(found) for t in self._fields()))

    def _fields(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.at_ids, self.tail, self.written


def combine_tops(choice: str, tops: Mapping[str, Tensor], served: Tensor | None) -> Support:
    """The support from the ids [tokens, k] of each ranking and those that were served."""
    if choice == "served":
        assert served is not None
        return Support(served, torch.ones_like(served, dtype=torch.bool))
    if choice in ("student", "teacher"):
        return Support(tops[choice], torch.ones_like(tops[choice], dtype=torch.bool))
    if choice == "union":
        first, second = tops["student"], tops["teacher"]
        new = ~is_among(second, first)
        return Support(torch.cat([first, second], dim=1), torch.cat([torch.ones_like(new), new], dim=1))
    other = served if choice == "student_in_served" else tops["teacher"]
    assert other is not None
    return Support(tops["student"], is_among(tops["student"], other))


def choose(
    choice: str, tops: Mapping[str, tuple[Tensor, Tensor]], served: Tensor | None, served_logits: Tensor | None
) -> tuple[Support, Tensor]:
    """The support, and the logits [models, tokens, k] on it, from (ids, logits) of each ranking."""
    support = combine_tops(choice, {name: ids for name, (ids, _) in tops.items()}, served)
    if choice == "served":
        assert served_logits is not None
        return support, served_logits
    if choice == "union":
        return support, torch.cat([tops["student"][1], tops["teacher"][1]], dim=2)
    return support, tops["teacher" if choice == "teacher" else "student"][1]


def is_among(ids: Tensor, others: Tensor) -> Tensor:
    """bool [tokens, k]: does each id stand among the same token's `others` [tokens, j]?"""
    return (ids.unsqueeze(2) == others.unsqueeze(1)).any(2)


def support_of_views(spec: FewNumbers, student: VocabView, teacher: VocabView | None, served: Tensor | None) -> Support:
    """The same choice, asked of two views."""
    views = {"student": student, "teacher": teacher}
    tops = {}
    for name in spec.rankings:
        view = views[name]
        assert view is not None
        tops[name] = view.topk(spec.k)
    return combine_tops(spec.choice, tops, served)


def few_of_view(view: VocabView, spec: FewNumbers, support: Support | None, written_ids: Tensor) -> FewLogProbs:
    """The same numbers, asked of a view."""
    if isinstance(view, PartialView):
        at = None if support is None else view.logprob_or(support.ids, support.mask)
        tail = view.tail_of(at, support.mask) if spec.tail and support is not None and at is not None else None
        return FewLogProbs(at, tail, view.sampled_logprobs)
    if support is None:
        return FewLogProbs(None, None, view.logprob(written_ids))
    tail = view.log_tail(support.ids, support.mask) if spec.tail else None
    return FewLogProbs(view.logprob(support.ids), tail, view.logprob(written_ids))
