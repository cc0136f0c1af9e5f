"""From hidden states to loss and gradients, a chunk of tokens at a time; nothing of size tokens x vocabulary is kept.

For each chunk: local logits of student and teacher, the collectives that make their statistics whole, the loss, and at
once its gradient with respect to the local logits, from which the gradients of hidden states and output layer follow by
two matrix products. Then the buffers are used again. Beyond inputs and gradients the memory is two buffers of
``chunk_tokens x vocabulary / TP`` (one without a teacher; one more under tensor parallelism, see below), independent of
the number of tokens.

Under tensor parallelism a chunk's statistics travel while the next chunk's student logits are computed, and its hidden
gradients travel while the following chunks are worked on. Which loss costs how many collectives is said where it is
computed (`generic`, `divergence`, `reduced`); each adds one all-reduce of the hidden gradient, [chunk, hidden].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_opd.types import TOKEN_SCORES, Need, TokenBatch
from nemo_opd.vocab import collectives
from nemo_opd.vocab.chunk import Chunk, ChunkResult, Method, always_measured, by_position
from nemo_opd.vocab.divergence import divergence_chunk
from nemo_opd.vocab.generic import generic_chunk
from nemo_opd.vocab.objective import Objective, Part, SampledScores, Weighting
from nemo_opd.vocab.output import OutputLayer, WeightGradient, hidden_gradient, logits_into
from nemo_opd.vocab.overlap import picked_tokens
from nemo_opd.vocab.reduced import reduced_chunk
from nemo_opd.vocab.row import gather_row
from nemo_opd.vocab.statistics import Scratch, Statistics, combine, local_statistics

__all__ = ["FusedLoss", "OutputLayer", "fused_loss"]


@dataclass(frozen=True)
class FusedLoss:
    """The loss of one packed row."""

    loss: Tensor
    """Scalar: sum over components c of ``sum_t w_t l_ct / normalisers[c]``; a differentiable 0 for no tokens."""
    sums: Mapping[str, Tensor]
    """Detached float64 [2] = (sum, count) per component (weighted, before its normaliser) and per metric; the same
    names on every rank, tokens or not."""
    tokens: Mapping[str, Tensor]
    """Float32 [tokens], by name, those of `TOKEN_SCORES` that the loss and its weight report; NaN where they do not
    count."""


def fused_loss(
    loss: Objective,
    hidden: Tensor,
    output: OutputLayer,
    teacher_output: OutputLayer | None,
    tokens: TokenBatch,
    normalisers: Mapping[str, float],
    weight: Weighting | None = None,
    chunk_tokens: int = 256,
    gradient: bool = True,
    grad_scale: float = 1.0,
    reduce_hidden: bool = True,
    sequence_group: dist.ProcessGroup | None = None,
    hand_written: bool = True,
) -> FusedLoss:
    """Loss and gradients of one packed row, exact under tensor parallelism.

    Args:
        loss: what is minimised. One with `parts` is computed part by part, each on its authors' tokens.
        hidden: [tokens, hidden], the same on every rank of ``output.shard.group``; row i predicts ``tokens.ids[i]``.
        output: the student's output layer. Its gradient is this rank's shard: added to ``weight.main_grad`` where that
            exists (`WeightGradient`), returned by autograd otherwise.
        teacher_output: the teacher's, with the same valid ids on every rank (`reshard_rows` lays it out so); needed
            when ``loss.needs`` is FULL.
        tokens: the trained tokens, on the device of `hidden`.
        normalisers: global token count of each component of the loss.
        weight: constant factors on tokens; None counts each once.
        chunk_tokens: tokens whose logits exist at the same time.
        gradient: False computes the value alone and adds nothing anywhere.
        grad_scale: what backward will hand to ``FusedLoss.loss`` (a loss scale, for example). Only needed with
            ``main_grad``, which is filled before backward is called; backward then refuses another one.
        reduce_hidden: True gives every rank the complete gradient of `hidden`. False leaves each rank its own part of
            the sum, for a caller whose backward adds them up anyway (the reduce-scatter of sequence parallelism).
        sequence_group: ranks over which the sequences of this row are split (context parallelism), for losses and
            weights that look at whole sequences; ``tokens.sequence`` numbers them alike on all of these ranks.
        hand_written: False computes every loss through autograd inside the chunk, for comparison.

    Raises:
        ValueError: shapes, vocabularies or normalisers that do not fit together.
    """
    if loss.parts:
        compute = partial(
            fused_loss, output=output, teacher_output=teacher_output, chunk_tokens=chunk_tokens, gradient=gradient,
            grad_scale=grad_scale, reduce_hidden=reduce_hidden, sequence_group=sequence_group,
            hand_written=hand_written,
        )  # fmt: skip
        return _sum_of_parts(loss.parts, hidden, tokens, normalisers, weight, compute)
    _check(loss, hidden, output, teacher_output, tokens, normalisers, chunk_tokens)
    job = _Job(
        loss, output, teacher_output, tokens, dict(normalisers), weight, chunk_tokens, grad_scale, reduce_hidden,
        sequence_group, hand_written,
    )  # fmt: skip
    if gradient and torch.is_grad_enabled() and (hidden.requires_grad or output.weight.requires_grad):
        value = _Fused.apply(hidden, output.weight, job)
    else:
        value = job.run(hidden.detach(), None, None)
    return FusedLoss(value, job.sums, job.kept)


def _sum_of_parts(
    parts: Sequence[Part],
    hidden: Tensor,
    tokens: TokenBatch,
    normalisers: Mapping[str, float],
    weight: Weighting | None,
    compute: Callable[..., FusedLoss],
) -> FusedLoss:
    """Each part on its own tokens, so that each keeps its hand-written backward; no token's logits are made twice."""
    total = torch.zeros((), device=hidden.device)
    sums: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}
    for part in parts:
        mine = part.members(tokens).nonzero().squeeze(1)
        found = compute(
            part.objective,
            hidden.index_select(0, mine),
            tokens=tokens.select(mine),
            normalisers={name: normalisers.get(part.label + name, 0.0) for name in part.objective.components},
            weight=part.weighting(weight),
        )
        total = total + found.loss
        sums |= {part.label + name: value for name, value in found.sums.items()}
        for name, values in found.tokens.items():
            kept.setdefault(name, values.new_full((len(tokens),), torch.nan))[mine] = values
    return FusedLoss(total, sums, kept)


def _check(
    loss: Objective,
    hidden: Tensor,
    output: OutputLayer,
    teacher_output: OutputLayer | None,
    tokens: TokenBatch,
    normalisers: Mapping[str, float],
    chunk_tokens: int,
) -> None:
    if hidden.shape != (len(tokens), output.weight.shape[1]):
        raise ValueError(
            f"hidden of shape {tuple(hidden.shape)}; expected [{len(tokens)}, {output.weight.shape[1]}] "
            f"(trained tokens, width of the output layer)"
        )
    if missing := [name for name in loss.components if not normalisers.get(name, 0.0) > 0.0]:
        raise ValueError(f"normalisers are {dict(normalisers)}; expected a positive number for each of {missing}")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; expected at least 1")
    if loss.needs.need != Need.FULL:
        return
    if teacher_output is None or (len(tokens) and tokens.teacher_hidden is None):
        raise ValueError(
            f"{type(loss).__name__} needs the teacher's whole distribution; expected teacher_output and "
            f"tokens.teacher_hidden; use a teacher that answers hidden states, or a loss on served scores"
        )
    if not output.shard.same_columns(teacher_output.shard):
        raise ValueError(
            f"student holds ids {output.shard}, teacher {teacher_output.shard}; expected the same valid ids; lay the "
            f"teacher's output layer out with nemo_opd.vocab.shard.reshard_rows"
        )


class _Fused(torch.autograd.Function):
    """Gradients are made in forward and handed out in backward."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, job: _Job) -> Tensor:
        need_hidden, need_weight, _ = ctx.needs_input_grad
        ctx.weight_gradient = WeightGradient(weight, job.output.shard, job.grad_scale) if need_weight else None
        ctx.dhidden = torch.zeros_like(hidden) if need_hidden else None
        job.scale = ctx.weight_gradient.scale if ctx.weight_gradient else 1.0
        ctx.scale = job.scale
        return job.run(hidden.detach(), ctx.dhidden, ctx.weight_gradient)

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        dweight = None if ctx.weight_gradient is None else ctx.weight_gradient.finish(grad_loss)
        dhidden = None if ctx.dhidden is None else ctx.dhidden * (grad_loss / ctx.scale)
        ctx.dhidden = None
        return dhidden, dweight, None


@dataclass
class _Job:
    """One call of `fused_loss`."""

    loss: Objective
    output: OutputLayer
    teacher_output: OutputLayer | None
    tokens: TokenBatch
    normalisers: dict[str, float]
    weight: Weighting | None
    chunk_tokens: int
    grad_scale: float
    reduce_hidden: bool
    sequence_group: dist.ProcessGroup | None
    hand_written: bool
    scale: float = 1.0

    def __post_init__(self) -> None:
        names = [*self.loss.components, *always_measured(self.loss), *self.loss.metric_names]
        names += list(self.weight.metric_names) if self.weight is not None else []
        count, device = len(self.tokens), self.tokens.ids.device
        self.sums = {name: torch.zeros(2, dtype=torch.float64, device=device) for name in names}
        self.kept = {name: torch.full((count,), torch.nan, device=device) for name in TOKEN_SCORES if name in self.sums}
        self.picked = picked_tokens(self.loss, self.tokens, range(0, count, self.chunk_tokens))

    def run(self, hidden: Tensor, dhidden: Tensor | None, dweight: WeightGradient | None) -> Tensor:
        """Pass over the chunks; fills `dhidden`, `dweight` and `self.sums`; returns the loss."""
        with torch.no_grad():
            self._count(self.loss.token_metrics(self.tokens))
            travelling: list[tuple[slice, collectives.Pending]] = []
            for part, result in self._results(hidden, gradient=dhidden is not None or dweight is not None):
                self._tally(part, result)
                if result.dlogits is None:
                    continue
                if dweight is not None:
                    dweight.add(result.dlogits, hidden[part])
                if dhidden is not None:
                    hidden_gradient(result.dlogits, self.output.rows, dhidden[part])
                    if self.reduce_hidden:
                        pending = collectives.start_all_reduce(
                            dhidden[part], self.output.shard.group, "all_reduce_hidden"
                        )
                        travelling.append((part, pending))
            for _, pending in travelling:
                pending.wait()
            if "teacher_logprob" in self.kept:
                self._count(by_position(self.kept["teacher_logprob"], self.tokens.offset))
            value = hidden.new_zeros((), dtype=self.output.logits_dtype)
            for name in self.loss.components:
                value += (self.sums[name][0] / self.normalisers[name]).to(value.dtype)
        return value

    def _results(self, hidden: Tensor, gradient: bool) -> Iterator[tuple[slice, ChunkResult]]:
        """Chunk by chunk. Under tensor parallelism the student's logits of the next chunk are computed while the
        statistics of this one travel, which takes a buffer more; without it there is nothing to wait for."""
        parts = self._parts()
        row = self._whole_row(hidden)
        ahead = self.output.shard.size > 1
        buffers = _Buffers(self, hidden.device, students=2 if ahead and len(parts) > 1 else 1)
        students = iter(self._student_logits(part, hidden, buffers.student(i)) for i, part in enumerate(parts))
        following = next(students, None)
        for part in parts:
            student, following = following, None
            assert student is not None
            method = self._method(self._chunk(part, student, buffers, row, gradient))
            next(method, None)
            if ahead:
                following = next(students, None)
            yield part, _finish(method)
            if not ahead:
                following = next(students, None)

    def _parts(self) -> list[slice]:
        count = len(self.tokens)
        return [slice(i, min(i + self.chunk_tokens, count)) for i in range(0, count, self.chunk_tokens)]

    def _student_logits(self, part: slice, hidden: Tensor, buffer: Tensor) -> Tensor:
        student = buffer[: part.stop - part.start]
        logits_into(student, hidden[part], self.output.rows)
        return student

    def _teacher_logits(self, part: slice, buffer: Tensor | None) -> Tensor | None:
        if buffer is None:
            return None
        assert self.teacher_output is not None and self.tokens.teacher_hidden is not None
        teacher = buffer[: part.stop - part.start]
        lost = ~self.tokens.teacher_valid[part].unsqueeze(1)
        logits_into(teacher, self.tokens.teacher_hidden[part].masked_fill(lost, 0.0), self.teacher_output.rows)
        return teacher

    def _method(self, chunk: Chunk) -> Method:
        if self.hand_written and self.loss.divergence is not None:
            return divergence_chunk(chunk, self.loss.divergence)
        if self.hand_written and self.loss.few is not None:
            return reduced_chunk(chunk, self.loss.few)
        return generic_chunk(chunk)

    def _chunk(self, part: slice, student: Tensor, buffers: _Buffers, row: _WholeRow, gradient: bool) -> Chunk:
        original = self.tokens.select(part)
        return Chunk(
            student=student,
            teacher=self._teacher_logits(part, buffers.teacher),
            shard=self.output.shard,
            tokens=_neutral(original),
            masks=self.loss.component_masks(original),
            normalisers=self.normalisers,
            objective=self.loss,
            weighting=self.weight,
            factors=None if row.factors is None else row.factors[part],
            prepared=None if row.prepared is None else row.prepared[part],
            scale=self.scale,
            gradient=gradient,
            scratch=buffers.scratch,
            picked=self.picked[part.start // self.chunk_tokens],
        )

    def _whole_row(self, hidden: Tensor) -> _WholeRow:
        """What the loss or the weight computes from the scores of a whole row, at the price of a pass without
        gradients (one collective per chunk, and two over the ranks that share the row's sequences)."""
        weight = self.weight if self.weight is not None and self.weight.whole_row else None
        if weight is None and not self.loss.whole_row:
            return _WholeRow(None, None)
        buffers = _Buffers(self, hidden.device, students=1)
        found = []
        for part in self._parts():
            student = self._student_logits(part, hidden, buffers.student(0))
            teacher = self._teacher_logits(part, buffers.teacher)
            ids = self.tokens.ids[part]
            fields, _ = local_statistics(student, teacher, ids, self.output.shard, buffers.scratch)
            found.append(combine(collectives.gather(fields, self.output.shard.group)))
        tokens, scores, mine = gather_row(_neutral(self.tokens), self._row_scores(found), self.sequence_group)
        # A gathered row knows no more which of its tokens count than `teacher_valid` says: a zero served is missing.
        prepared = self.loss.prepare(scores, tokens) if self.loss.whole_row else None
        factors = None
        if weight is not None:
            factors, metrics = weight.factors(scores, tokens)
            factors = factors[mine]
            mine_alone = {name: (values[mine], where[mine]) for name, (values, where) in metrics.items()}
            self._keep(slice(0, len(self.tokens)), mine_alone)
            self._count(mine_alone)
        return _WholeRow(factors, None if prepared is None else prepared[mine])

    def _row_scores(self, found: list[Statistics]) -> SampledScores:
        def column(name: str) -> Tensor:
            empty = torch.zeros(0, dtype=self.output.logits_dtype, device=self.tokens.ids.device)
            return torch.cat([empty, *(getattr(one, name) for one in found)])

        full = self.loss.needs.need == Need.FULL
        served = _neutral(self.tokens).teacher_sampled_logprobs if self.loss.needs.need != Need.NOTHING else None
        return SampledScores(
            column("student_written"),
            column("teacher_written") if full else served,
            column("student_entropy"),
            column("teacher_entropy") if full else None,
        )

    def _count(self, metrics: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """All metrics at once: for short chunks it is the number of operations that costs."""
        if not metrics:
            return
        values, where = (torch.stack(part) for part in zip(*metrics.values(), strict=True))
        totals = torch.where(where, values, 0.0).sum(1, dtype=torch.float64)
        found = torch.stack([totals, where.sum(1)], dim=1)
        torch._foreach_add_([self.sums[name] for name in metrics], list(found.unbind()))

    def _keep(self, part: slice, metrics: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        for name, kept in self.kept.items():
            if name in metrics:
                values, where = metrics[name]
                kept[part] = torch.where(where, values, torch.nan)

    def _tally(self, part: slice, result: ChunkResult) -> None:
        for name, loss in result.losses.items():
            # Where, not times: a token that does not count may hold anything.
            mask = result.masks[name]
            self.sums[name][0] += torch.where(mask, result.weights[name] * loss, 0.0).sum(dtype=torch.float64)
            self.sums[name][1] += mask.sum()
        self._keep(part, result.metrics)
        self._count(result.metrics)


@dataclass(frozen=True)
class _WholeRow:
    factors: Tensor | None
    prepared: Tensor | None


class _Buffers:
    """The logits of one chunk, [chunk, valid columns] each, used again and again."""

    def __init__(self, job: _Job, device: torch.device, students: int) -> None:
        shape = (min(job.chunk_tokens, len(job.tokens)), job.output.shard.valid)

        def make() -> Tensor:
            return torch.empty(shape, dtype=job.output.logits_dtype, device=device)

        self._students = [make() for _ in range(students)]
        self.scratch = Scratch()
        self.teacher = make() if job.loss.needs.need == Need.FULL else None

    def student(self, chunk: int) -> Tensor:
        return self._students[chunk % len(self._students)]


def _finish(method: Method) -> ChunkResult:
    """Run a chunk to its end, waiting for each collective as it comes."""
    while True:
        try:
            next(method)
        except StopIteration as done:
            return done.value


def _neutral(tokens: TokenBatch) -> TokenBatch:
    """Tokens without a (finite) teacher score get a harmless payload. They are in no component's mask, so nothing of
    it is counted; but a NaN times 0 is a NaN."""
    lost = ~tokens.teacher_valid
    for served in (tokens.teacher_sampled_logprobs, tokens.teacher_id_logprobs, tokens.teacher_base_logprobs):
        if served is not None:
            lost = lost | ~(served.isfinite() if served.ndim == 1 else served.isfinite().all(1))
    changes = {"teacher_valid": ~lost}
    for name in ("teacher_sampled_logprobs", "teacher_id_logprobs", "teacher_base_logprobs"):
        if (payload := getattr(tokens, name)) is not None:
            changes[name] = payload.masked_fill(lost if payload.ndim == 1 else lost.unsqueeze(1), 0.0)
    if tokens.teacher_ids is not None:
        changes["teacher_ids"] = tokens.teacher_ids.masked_fill(lost.unsqueeze(1), 0)
    return replace(tokens, **changes)
