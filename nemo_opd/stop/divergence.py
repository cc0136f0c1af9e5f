"""d_t = KL(p_t || q_t) at every token of what the student wrote, whatever engines hold the two models.

Student and teacher are both asked through the `Scorer` protocol, at temperature 1, on the same tokens after the prompt
that each of them sees; or the student said its k best ids when it wrote (`Rollout.best`) and is not asked again. What
comes out is a number per token: nothing here is differentiated, and nothing of size tokens x vocabulary is kept or
sent.

    full    sum_v p_v (log p_v - log q_v)       both answer hidden states; the rank that works a span out holds both
                                                output layers, whole
    tail    sum_S p_v (log p_v - log q_v) + p_tail (log p_tail - log q_tail)        S: k ids, the student's most
                                                probable ones or the teacher's; at most `full`, by the data-processing
                                                inequality

**Exact:** p is the student that wrote the tokens (the generator's weights in the generator's dtype), not its sampling
distribution after temperature and top-p; `full` is the KL divergence up to rounding in float32; `tail` is the exact
divergence of the k+1 buckets up to rounding and to p_tail and q_tail, which are 1 minus a sum of served numbers and
are held at 1e-6 or more: where the teacher leaves the tail less than that, d is too small by
p_tail log(1e-6 / q_tail). **Not exact:** the trainer's logits may differ from the generator's by the rounding of their
kernels. The rule compares window means with a quantile of window means, so rounding moves a cut only at a near tie.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nemo_opd.engines.protocols import Scorer
from nemo_opd.processes import Processes, balanced
from nemo_opd.types import BestIds, Need, ScoreRequest, TeacherNeeds, TeacherScores
from nemo_opd.vocab.logits import LogitsView
from nemo_opd.vocab.output import logits_into
from nemo_opd.vocab.partial import PartialView

_TOKENS_AT_ONCE = 32768
"""Tokens measured between two gathers: bounds the ids (k per token) and hidden states that exist at the same time."""
_CHUNK_TOKENS = 256
"""Tokens whose logits exist at the same time."""


@dataclass(frozen=True)
class Span:
    """Some tokens of a response and what each model read before them (earlier tokens of the response included)."""

    student_context: tuple[int, ...]
    teacher_context: tuple[int, ...]
    ids: Tensor
    """int64 [tokens]"""
    best: BestIds | None = None
    """What the student said of these tokens when it drew them; on the rank that wrote them alone."""

    def request(self, key: int, owner: int, teacher: bool, at_ids: Tensor | None = None) -> ScoreRequest:
        context = self.teacher_context if teacher else self.student_context
        return ScoreRequest(key, context, self.ids, (owner,), at_ids)


class Divergence(Protocol):
    """Works d out for a few spans."""

    def __call__(self, spans: Sequence[Span], owners: Sequence[int]) -> Mapping[int, Tensor]:
        """By number of the span, [tokens] in nats, NaN where a score is missing; on the span's owner alone.

        Collective: every rank passes the same spans and owners.
        """


class Measure:
    """d of any number of spans, known on every rank.

    Every rank passes the same list. Spans are dealt out over the ranks by length, each rank works its share out, and
    one gather per `_TOKENS_AT_ONCE` tokens makes the numbers common. No key-value cache outlives a call: a span's
    context is read again each time.
    """

    def __init__(self, divergence: Divergence, processes: Processes, of_writers: bool = False) -> None:
        """`of_writers`: a span belongs to the rank that holds its `Span.best`, at the cost of one more gather."""
        self._divergence, self._processes, self._of_writers = divergence, processes, of_writers

    def __call__(self, spans: Sequence[Span]) -> list[Tensor]:
        """[tokens] of each span, float32, in nats; NaN where a score is missing. Collective."""
        return [values for block in _blocks(spans) for values in self._block(block)]

    def _block(self, spans: Sequence[Span]) -> Iterator[Tensor]:
        shares = self._held(spans) if self._of_writers else self._dealt(spans)
        owners = {number: rank for rank, share in enumerate(shares) for number in share}
        found = self._divergence(spans, [owners[number] for number in range(len(spans))])
        mine = [found[number].float() for number in shares[self._processes.rank]]
        parts = self._processes.gather(torch.cat([*mine, torch.empty(0)]))
        values: dict[int, Tensor] = {}
        for share, part in zip(shares, parts, strict=True):
            values |= zip(share, part.split([len(spans[number].ids) for number in share]), strict=True)
        return (values[number] for number in range(len(spans)))

    def _dealt(self, spans: Sequence[Span]) -> list[list[int]]:
        lengths = [len(span.student_context) + len(span.ids) for span in spans]
        return balanced(lengths, self._processes.size)

    def _held(self, spans: Sequence[Span]) -> list[list[int]]:
        mine = [number for number, span in enumerate(spans) if span.best is not None]
        shares = [part.tolist() for part in self._processes.gather(torch.tensor(mine, dtype=torch.int64))]
        found = sorted(number for share in shares for number in share)
        assert found == list(range(len(spans))), "of each span one rank knows what the student said"
        return shares


def _blocks(spans: Sequence[Span]) -> Iterator[Sequence[Span]]:
    """Neighbours of together at most `_TOKENS_AT_ONCE` tokens; a longer span goes alone."""
    first = tokens = 0
    for number, span in enumerate(spans):
        if number > first and tokens + len(span.ids) > _TOKENS_AT_ONCE:
            yield spans[first:number]
            first, tokens = number, 0
        tokens += len(span.ids)
    if first < len(spans):
        yield spans[first:]


@dataclass(frozen=True)
class TailDivergence:
    """Over k ids and one bucket for everything else.

    One of the models names its k best ids, these travel to all ranks (a scorer's request list is global), and the other
    model is asked for its log-probabilities there. Without a `student` its best ids are those in `Span.best`, on the
    spans' owners (`Measure` with `of_writers`).
    """

    student: Scorer | None
    teacher: Scorer
    k: int
    processes: Processes
    teacher_chooses: bool = False
    """S is the teacher's top k (all that some servers report) instead of the student's."""

    def __call__(self, spans: Sequence[Span], owners: Sequence[int]) -> dict[int, Tensor]:
        assert self.student is not None or not self.teacher_chooses, "a student that is not asked has chosen"
        chooser, other = (self.teacher, self.student) if self.teacher_chooses else (self.student, self.teacher)
        assert other is not None
        numbered = list(enumerate(zip(spans, owners, strict=True)))
        best = (
            {i: _said(i, span) for i, (span, owner) in numbered if owner == self.processes.rank}
            if chooser is None
            else _by_key(
                chooser,
                [span.request(i, owner, self.teacher_chooses) for i, (span, owner) in numbered],
                TeacherNeeds(Need.TOP_K, self.k),
            )
        )
        at_ids = self._everywhere(spans, owners, best)
        at = _by_key(
            other,
            [span.request(i, owner, not self.teacher_chooses, at_ids[i]) for i, (span, owner) in numbered],
            TeacherNeeds(Need.AT_IDS, self.k),
        )
        student, teacher = (at, best) if self.teacher_chooses else (best, at)
        return {number: _bucket_divergence(student[number], teacher[number]) for number in at}

    def _everywhere(
        self, spans: Sequence[Span], owners: Sequence[int], best: Mapping[int, TeacherScores]
    ) -> dict[int, Tensor]:
        """Each span's ids [tokens, k] on every rank. One gather."""
        mine = [chosen.flatten() for number in sorted(best) if (chosen := best[number].ids) is not None]
        parts = self.processes.gather(torch.cat([*mine, torch.empty(0, dtype=torch.int64)]))
        ids: dict[int, Tensor] = {}
        for rank, part in enumerate(parts):
            share = [number for number, owner in enumerate(owners) if owner == rank]
            sizes = [self.k * len(spans[number].ids) for number in share]
            ids |= {n: flat.view(-1, self.k) for n, flat in zip(share, part.split(sizes), strict=True)}
        return ids


@dataclass(frozen=True)
class FullDivergence:
    """Over the whole vocabulary: hidden states times output layers, a chunk of tokens at a time."""

    student: Scorer
    teacher: Scorer
    student_output: Tensor
    """[vocab, hidden], the generator's own tensor, which takes every new set of weights in place"""
    teacher_output: Tensor
    """[vocab, hidden], the rows of the student's ids"""

    def __call__(self, spans: Sequence[Span], owners: Sequence[int]) -> dict[int, Tensor]:
        needs = TeacherNeeds(Need.FULL)
        numbered = list(enumerate(zip(spans, owners, strict=True)))
        student = _by_key(self.student, [span.request(i, owner, False) for i, (span, owner) in numbered], needs)
        teacher = _by_key(self.teacher, [span.request(i, owner, True) for i, (span, owner) in numbered], needs)
        return {number: self._divergence(student[number], teacher[number]) for number in student}

    def _divergence(self, student: TeacherScores, teacher: TeacherScores) -> Tensor:
        assert student.hidden is not None and teacher.hidden is not None
        valid = student.valid & teacher.valid
        chunks = zip(student.hidden.split(_CHUNK_TOKENS), teacher.hidden.split(_CHUNK_TOKENS), strict=True)
        values = [self._chunk(own, theirs) for own, theirs in chunks]
        return torch.where(valid, torch.cat([*values, torch.empty(0)]), torch.nan)

    @torch.no_grad()
    def _chunk(self, student: Tensor, teacher: Tensor) -> Tensor:
        p, q = _dense(student, self.student_output), _dense(teacher, self.teacher_output)
        return p.expectation(lambda log_p, log_q: log_p - log_q, q).float().cpu()


def _said(number: int, span: Span) -> TeacherScores:
    """What the student said when it wrote, as if it had been asked. A number that is not finite is no score."""
    assert span.best is not None and len(span.best) == len(span.ids), number
    logprobs = span.best.logprobs
    return TeacherScores(number, logprobs.isfinite().all(1), ids=span.best.ids.long(), id_logprobs=logprobs)


def _by_key(scorer: Scorer, requests: Sequence[ScoreRequest], needs: TeacherNeeds) -> dict[int, TeacherScores]:
    """The answers for this rank."""
    return {answer.key: answer for answer in scorer.score(requests, needs)}


def _bucket_divergence(student: TeacherScores, teacher: TeacherScores) -> Tensor:
    """KL of the k+1 buckets, in float64 from the served float32 numbers."""
    (log_p, p_tail), (log_q, q_tail) = _buckets(student), _buckets(teacher)
    values = (log_p.exp() * (log_p - log_q)).sum(1) + p_tail.exp() * (p_tail - q_tail)
    return torch.where(student.valid & teacher.valid, values, torch.nan)


def _buckets(scores: TeacherScores) -> tuple[Tensor, Tensor]:
    """(log-probabilities of S [tokens, k], log of the mass outside [tokens]), float64."""
    assert scores.id_logprobs is not None
    logprobs = scores.id_logprobs.double()
    return logprobs, PartialView.tail_of(logprobs, torch.ones_like(logprobs, dtype=torch.bool))


def _dense(hidden: Tensor, output: Tensor) -> LogitsView:
    dtype = torch.float64 if output.dtype == torch.float64 else torch.float32
    logits = torch.empty(len(hidden), len(output), dtype=dtype, device=output.device)
    logits_into(logits, hidden.to(output.device), output)
    return LogitsView(logits)
