"""Any loss, through its own autograd inside the chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_opd.types import Need
from nemo_opd.vocab import collectives
from nemo_opd.vocab.chunk import Chunk, ChunkResult, Method, standard_metrics
from nemo_opd.vocab.logits import LogitsView
from nemo_opd.vocab.objective import Evaluation, SampledScores
from nemo_opd.vocab.partial import PartialView


def generic_chunk(chunk: Chunk) -> Method:
    """Value by the loss's `evaluate`, gradient by autograd on the logits of the chunk.

    Collectives in forward: 1 for the normalisers of both models, 1 for sampled log-probabilities and metrics, and
    those of the loss (`LogitsView` says how many). Memory: a few buffers of chunk x local vocabulary.
    """
    # Gradient mode is switched on only after the last yield: a generator would leak it to its caller.
    pending = start_normalisers(chunk)
    yield pending
    with torch.enable_grad():
        student = LogitsView(chunk.student.requires_grad_(chunk.gradient), chunk.shard)
        teacher = _teacher(chunk)
        whole = pending.wait().logsumexp(0)
        student.know_logsumexp(whole[0])
        if isinstance(teacher, LogitsView):
            teacher.know_logsumexp(whole[1])
        scores, kl = measure(student.detach(), teacher, chunk)
        weights, metrics = chunk.weights(scores)
        evaluation = chunk.objective.evaluate(student, teacher, chunk.tokens, chunk.constants(scores))
        dlogits = _gradient(chunk, evaluation, weights)
    chunk.student.requires_grad_(False)
    return ChunkResult(
        losses={name: loss.detach() for name, loss in evaluation.losses.items()},
        weights=weights,
        masks=chunk.masks,
        metrics={**standard_metrics(scores, kl, chunk.tokens), **metrics, **evaluation.metrics},
        dlogits=dlogits,
    )


def _teacher(chunk: Chunk) -> LogitsView | PartialView | None:
    if chunk.teacher is not None:
        return LogitsView(chunk.teacher, chunk.shard)
    return None if chunk.objective.needs.need == Need.NOTHING else chunk.served()


def _gradient(chunk: Chunk, evaluation: Evaluation, weights: dict[str, Tensor]) -> Tensor | None:
    if not chunk.gradient:
        return None
    total = chunk.student.new_zeros(())
    for name, loss in evaluation.losses.items():
        total = total + (weights[name] / chunk.normalisers[name] * torch.where(chunk.masks[name], loss, 0.0)).sum()
    if not total.requires_grad:
        return None
    # Each rank differentiates the sum of all ranks' losses, which are equal: see nemo_opd.vocab.collectives.
    return torch.autograd.grad(total * (chunk.scale / chunk.shard.size), chunk.student)[0]


def start_normalisers(chunk: Chunk) -> collectives.Pending:
    """Begin the one collective that normalises both models: a gather of each rank's own logsumexp, [ranks, 1 or 2,
    tokens]."""
    local = [collectives.local_logsumexp(t) for t in (chunk.student, chunk.teacher) if t is not None]
    return collectives.start_gather(torch.stack(local), chunk.shard.group)


@torch.no_grad()
def measure(
    student: LogitsView, teacher: LogitsView | PartialView | None, chunk: Chunk
) -> tuple[SampledScores, Tensor | None]:
    """Sampled log-probabilities, entropies and KL(p || q), in one collective."""
    columns, here = chunk.shard.local(chunk.tokens.ids)

    def at_written(log_probs: Tensor) -> Tensor:
        if log_probs.shape[1] == 0:
            return log_probs.sum(1)
        return torch.where(here, log_probs.gather(1, columns.unsqueeze(1)).squeeze(1), 0.0)

    log_p = student.log_probs()
    p = log_p.exp()
    parts = [at_written(log_p), -(p * log_p).sum(1)]
    if isinstance(teacher, LogitsView):
        log_q = teacher.log_probs()
        parts += [at_written(log_q), -(log_q.exp() * log_q).sum(1), (p * (log_p - log_q)).sum(1)]
    whole = collectives.all_reduce(torch.stack(parts), chunk.shard.group)
    if isinstance(teacher, LogitsView):
        return SampledScores(whole[0], whole[2], whole[1], whole[3]), whole[4]
    served = teacher.sampled_logprobs if isinstance(teacher, PartialView) else None
    return SampledScores(whole[0], served, whole[1]), None
