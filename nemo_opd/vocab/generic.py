"""Any loss, through its own autograd inside the chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_opd.types import Need
from nemo_opd.vocab import collectives
from nemo_opd.vocab.chunk import Chunk, ChunkResult, Method, standard_metrics
from nemo_opd.vocab.logits import LogitsView
from nemo_opd.vocab.objective import Evaluation
from nemo_opd.vocab.overlap import overlap_of_views
from nemo_opd.vocab.partial import PartialView
from nemo_opd.vocab.statistics import combine, local_statistics


def generic_chunk(chunk: Chunk) -> Method:
    """Value by the loss's `evaluate`, gradient by autograd on the logits of the chunk.

    Collectives in forward: 1 for the statistics of both models, and those of the loss (`LogitsView` says how many; none
    of them of the vocabulary's size). Memory: a few more buffers of chunk x local vocabulary.
    """
    # Gradient mode is switched on only after the last yield: a generator would leak it to its caller.
    fields, _ = local_statistics(chunk.student, chunk.teacher, chunk.tokens.ids, chunk.shard, chunk.scratch)
    pending = collectives.start_gather(fields, chunk.shard.group)
    yield pending
    found = combine(pending.wait())
    scores = chunk.scores(found)
    weights, metrics = chunk.weights(scores)
    with torch.enable_grad():
        student = LogitsView(chunk.student.requires_grad_(chunk.gradient), chunk.shard)
        teacher = _teacher(chunk)
        student.know_logsumexp(found.student_logsumexp)
        if isinstance(teacher, LogitsView):
            assert found.teacher_logsumexp is not None
            teacher.know_logsumexp(found.teacher_logsumexp)
        evaluation = chunk.objective.evaluate(student, teacher, chunk.tokens, chunk.constants(scores))
        dlogits = _gradient(chunk, evaluation, weights)
    chunk.student.requires_grad_(False)
    overlap = overlap_of_views(chunk.objective, student.detach(), teacher, chunk.tokens, chunk.picked)
    return ChunkResult(
        losses={name: loss.detach() for name, loss in evaluation.losses.items()},
        weights=weights,
        masks=chunk.masks,
        metrics={**standard_metrics(scores, found.kl, chunk.tokens), **overlap, **metrics, **evaluation.metrics},
        dlogits=dlogits,
    )


def _teacher(chunk: Chunk) -> LogitsView | PartialView | None:
    if chunk.teacher is not None:
        return LogitsView(chunk.teacher, chunk.shard)
    return None if chunk.objective.needs.need == Need.NOTHING else chunk.served()


def _gradient(chunk: Chunk, evaluation: Evaluation, weights: dict[str, Tensor]) -> Tensor | None:
    if not chunk.gradient:
        return None
    total = chunk.total(evaluation.losses, weights)
    if not total.requires_grad:
        return None
    # Each rank differentiates the sum of all ranks' losses, which are equal: see nemo_opd.vocab.collectives.
    return torch.autograd.grad(total / chunk.shard.size, chunk.student)[0]
