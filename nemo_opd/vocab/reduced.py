"""Losses of a few log-probabilities per token (sampled-token and top-k losses), with a hand-written backward.

Such a loss sees the student through log p at the ids of a set S, the log of the mass outside S, and log p(y) of the
written token: k + 2 numbers, the same on all ranks. Autograd runs on these numbers alone, ``g_v = dL/dlog p_v``,
``g_t = dL/dlog p_tail``, ``g_y = dL/dlog p_y``, and the rest is the same for all of them:

    dL/dz_u = -p_u (sum_S g + g_t + g_y) + [u in S] g_u + [u not in S] p_u g_t / p_tail + [u = y] g_y

written in place over the student's logits. Collectives in forward: 1 for the statistics of both models together with
the candidates of top-k and the logits at given ids, 1 more when the tail is needed. Backward adds none. The largest
message has ``8 + 2 k (1 + 2 rankings)`` numbers per token, and k more for a sixteenth of them (`overlap`), never the
vocabulary.

The mass of the tail is a logsumexp with S left out, not ``log(1 - mass)``: it keeps its precision however small it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_opd.types import Need
from nemo_opd.vocab import collectives
from nemo_opd.vocab.chunk import Chunk, ChunkResult, Method, Metrics, standard_metrics
from nemo_opd.vocab.kernels import kernels_for
from nemo_opd.vocab.logits import local_topk
from nemo_opd.vocab.overlap import (
    KNOWN,
    OTHER,
    is_measurable,
    least_of_top,
    overlap_above,
    overlap_of_support,
    pack_top,
)
from nemo_opd.vocab.shard import VocabShard
from nemo_opd.vocab.statistics import Statistics, blocked_logsumexp, combine, local_statistics, row_blocks
from nemo_opd.vocab.support import FewLogProbs, FewNumbers, Support, choose

LEAST_LOG_TAIL = {torch.float32: -80.0, torch.float64: -700.0}
"""Least log mass of a tail whose inverse is formed: beyond it exp overflows."""


def reduced_chunk(chunk: Chunk, spec: FewNumbers) -> Method:
    """Value and gradient of one chunk. The student's buffer ends up holding the gradient."""
    packed = _pack(chunk, spec)
    pending = collectives.start_gather(packed.tensor, chunk.shard.group)
    yield pending
    found, support, at_ids = packed.unpack(pending.wait(), chunk)
    overlap = packed.overlap(pending.wait(), chunk, support, at_ids)
    tails: tuple[Tensor | None, Tensor | None] = (None, None)
    if spec.tail:
        assert support is not None
        pending = collectives.start_gather(_local_tails(chunk, support), chunk.shard.group)
        yield pending
        whole = pending.wait().logsumexp(0)
        tails = (whole[0], whole[1] if chunk.teacher is not None else None)
    student, teacher = _numbers(chunk, found, support, at_ids, tails)
    scores = chunk.scores(found)
    weights, metrics = chunk.weights(scores)
    prepared = chunk.constants(scores)
    with torch.enable_grad():
        leaves = student.as_leaves(chunk.gradient)
        evaluation = chunk.objective.evaluate_few(leaves, teacher, support, chunk.tokens, prepared)
        total = chunk.total(evaluation.losses, weights)
    if chunk.gradient:
        _gradient(chunk, found, support, leaves, leaves.gradients(total))
    return ChunkResult(
        losses={name: loss.detach() for name, loss in evaluation.losses.items()},
        weights=weights,
        masks=chunk.masks,
        metrics={**standard_metrics(scores, found.kl, chunk.tokens), **overlap, **metrics, **evaluation.metrics},
        dlogits=chunk.student if chunk.gradient else None,
    )


@dataclass(frozen=True)
class _Packed:
    """What a rank sends about its columns: statistics, logits at given ids, candidates of the rankings."""

    tensor: Tensor
    """[numbers, tokens]"""
    given: Tensor | None
    """int64 [tokens, k] ids that are known beforehand"""
    rankings: tuple[str, ...]
    k: int
    statistics: int
    """Rows of `tensor` that are statistics."""

    choice: str
    other: int
    """Last rows of `tensor`, with the k largest logits of the model whose top set is not asked for otherwise."""

    def unpack(self, gathered: Tensor, chunk: Chunk) -> tuple[Statistics, Support | None, tuple[Tensor, Tensor | None]]:
        """(statistics, support, logits of student and teacher on it) from [ranks, numbers, tokens]."""
        models = 1 if chunk.teacher is None else 2
        found, rest = combine(gathered[:, : self.statistics]), gathered[:, self.statistics :]
        tops: dict[str, tuple[Tensor, Tensor]] = {}
        served, given_logits = self.given, None
        if served is not None:
            width = served.shape[1]
            given_logits = rest[:, : models * width].sum(0).unflatten(0, (models, width)).transpose(1, 2)
            rest = rest[:, models * width :]
        for ranking in self.rankings:
            candidates, rest = rest[:, : (1 + models) * self.k], rest[:, (1 + models) * self.k :]
            tops[ranking] = _merge(candidates.unflatten(1, (1 + models, self.k)), ranking == "teacher", self.k)
        if not tops and served is None:
            return found, None, (found.student_written.new_empty(0), None)
        support, logits = choose(self.choice, tops, served, given_logits)
        return found, support, (logits[0], logits[1] if models == 2 else None)

    def overlap(
        self, gathered: Tensor, chunk: Chunk, support: Support | None, at_ids: tuple[Tensor, Tensor | None]
    ) -> Metrics:
        """The overlap of both models' top sets, as far as it is known."""
        if support is None or not is_measurable(chunk.objective):
            return {}
        if self.choice in KNOWN:
            return overlap_of_support(self.choice, self.k, support, chunk.tokens)
        if not self.other:
            return {}
        logits = at_ids[1] if OTHER[self.choice] == "teacher" else at_ids[0]
        assert logits is not None
        least = least_of_top(gathered[:, -self.other :], len(chunk.picked), self.k)
        return overlap_above(least, logits, support, chunk.tokens, chunk.picked)


def _merge(candidates: Tensor, by_teacher: bool, k: int) -> tuple[Tensor, Tensor]:
    """The k best of [ranks, 1 + models, k, tokens] as (ids [tokens, k], logits [models, tokens, k])."""
    flat = candidates.permute(1, 3, 0, 2).flatten(2)
    ranked = flat[1 + int(by_teacher)]
    best = ranked.argsort(dim=1, descending=True, stable=True)[:, :k]
    return flat[0].gather(1, best).to(torch.int64), flat[1:].gather(2, best.expand(flat.shape[0] - 1, -1, -1))


def _pack(chunk: Chunk, spec: FewNumbers) -> _Packed:
    fields, _ = local_statistics(chunk.student, chunk.teacher, chunk.tokens.ids, chunk.shard, chunk.scratch)
    models = [chunk.student] if chunk.teacher is None else [chunk.student, chunk.teacher]
    parts = [fields]
    given = chunk.tokens.teacher_ids if spec.choice in ("served", "student_in_served") else None
    if given is not None:
        parts += [_at_columns(logits, given, chunk.shard).t() for logits in models]
    for ranking in spec.rankings:
        chooser = chunk.teacher if ranking == "teacher" else chunk.student
        assert chooser is not None
        _, ids = local_topk(chooser, spec.k, chunk.shard)
        parts.append(ids.t().to(fields.dtype))
        parts += [_at_columns(logits, ids, chunk.shard, -torch.inf).t() for logits in models]
    other = None
    if spec.choice in OTHER and is_measurable(chunk.objective) and len(chunk.picked):
        logits = chunk.teacher if OTHER[spec.choice] == "teacher" else chunk.student
        assert logits is not None
        other = pack_top(logits[chunk.picked], spec.k, chunk.shard, fields.shape[1])
        parts.append(other)
    rows = 0 if other is None else other.shape[0]
    return _Packed(torch.cat(parts), given, spec.rankings, spec.k, fields.shape[0], spec.choice, rows)


def _at_columns(logits: Tensor, ids: Tensor, shard: VocabShard, elsewhere: float = 0.0) -> Tensor:
    """[tokens, k] local logits at global ids, `elsewhere` where another rank holds the id."""
    columns, here = shard.local(ids)
    if shard.valid == 0:
        return logits.new_full(ids.shape, elsewhere)
    return torch.where(here, logits.gather(1, columns), elsewhere)


def _numbers(
    chunk: Chunk,
    found: Statistics,
    support: Support | None,
    at_ids: tuple[Tensor, Tensor | None],
    tails: tuple[Tensor | None, Tensor | None],
) -> tuple[FewLogProbs, FewLogProbs | None]:
    """The few log-probabilities of student and teacher."""

    def normalised(logits: Tensor | None, tail: Tensor | None, lse: Tensor, written: Tensor) -> FewLogProbs:
        at = None if support is None or logits is None else logits - lse.unsqueeze(1)
        return FewLogProbs(at, None if tail is None else tail - lse, written)

    student = normalised(at_ids[0], tails[0], found.student_logsumexp, found.student_written)
    if chunk.teacher is not None:
        assert found.teacher_logsumexp is not None and found.teacher_written is not None
        return student, normalised(at_ids[1], tails[1], found.teacher_logsumexp, found.teacher_written)
    if chunk.objective.needs.need == Need.NOTHING:
        return student, None
    view = chunk.served()
    at = tail = None
    if support is not None:
        at = view.logprob_or(support.ids, support.mask)
        tail = view.tail_of(at, support.mask)
    return student, FewLogProbs(at, tail, chunk.tokens.teacher_sampled_logprobs)


def eager_scaled_softmax(logits: Tensor, logsumexp: Tensor, factor: Tensor) -> None:
    """logits <- factor exp(logits - logsumexp), row by row"""
    for rows in row_blocks(logits):
        logits[rows].sub_(logsumexp[rows].unsqueeze(1)).exp_().mul_(factor[rows].unsqueeze(1))


class _Columns:
    """The local columns of a support, addressed without dynamic shapes: an entry that another rank holds (or that is
    masked out) is redirected to an entry of the same token that is here, or to column 0, and writes what stands there.
    """

    def __init__(self, support: Support, shard: VocabShard) -> None:
        columns, here = shard.local(support.ids)
        self.here = here & support.mask
        first = self.here.to(torch.int8).argmax(1, keepdim=True)
        stand_in = torch.where(self.here.any(1, keepdim=True), columns.gather(1, first), 0)
        self.columns = torch.where(self.here, columns, stand_in)
        self.first = first

    def read(self, logits: Tensor) -> Tensor:
        return logits.gather(1, self.columns)

    def write(self, logits: Tensor, values: Tensor) -> None:
        """Set the entries that are here; whatever else the index reaches keeps its value, or gets the same one."""
        any_here = self.here.any(1, keepdim=True)
        spare = torch.where(any_here, values.gather(1, self.first), logits[:, :1])
        logits.scatter_(1, self.columns, torch.where(self.here, values, spare))


def _local_tails(chunk: Chunk, support: Support) -> Tensor:
    """[1 or 2, tokens] logsumexp over the local columns outside the support, both models."""
    models = [chunk.student] if chunk.teacher is None else [chunk.student, chunk.teacher]
    if chunk.shard.valid == 0:
        return chunk.student.new_full((len(models), chunk.student.shape[0]), -torch.inf)
    columns, tails = _Columns(support, chunk.shard), []
    for logits in models:
        kept = columns.read(logits)
        columns.write(logits, torch.full_like(kept, -torch.inf))
        tails.append(blocked_logsumexp(logits, chunk.scratch))
        columns.write(logits, kept)
    return torch.stack(tails)


def _gradient(
    chunk: Chunk, found: Statistics, support: Support | None, leaves: FewLogProbs, grads: FewLogProbs
) -> None:
    """Write dL/dz over the student's logits."""
    z = chunk.student
    if z.shape[1] == 0:
        return
    written = torch.zeros_like(found.student_written) if grads.written is None else grads.written
    everywhere = written.clone()
    if support is not None and grads.at_ids is not None:
        everywhere += torch.where(support.mask, grads.at_ids, 0.0).sum(1)
    outside = torch.zeros_like(everywhere)
    if grads.tail is not None and leaves.tail is not None:
        everywhere += grads.tail
        # A tail this small has a gradient that is as small: nothing is lost, and 1/p_tail stays finite.
        tail = leaves.tail.detach()
        seen = tail > LEAST_LOG_TAIL[z.dtype]
        outside = torch.where(seen, grads.tail * torch.exp(-torch.where(seen, tail, 0.0)), 0.0)
    if (kernels := kernels_for(z)) is not None:
        kernels.gradient(z, None, found.student_logsumexp, None, None, outside - everywhere, "scaled_softmax")
    else:
        eager_scaled_softmax(z, found.student_logsumexp, outside - everywhere)
    if support is not None and grads.at_ids is not None:
        assert leaves.at_ids is not None
        p = leaves.at_ids.detach().exp()
        _Columns(support, chunk.shard).write(z, grads.at_ids - p * everywhere.unsqueeze(1))
    columns, here = chunk.shard.local(chunk.tokens.ids)
    z.scatter_add_(1, columns.unsqueeze(1), torch.where(here, written, 0.0).unsqueeze(1))
