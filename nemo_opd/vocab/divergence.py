"""Divergences over the whole vocabulary with a hand-written backward, in the buffers that held the logits.

Every divergence D here has a gradient of the form ``dD/dz_u = p_u (G_u - sum_v p_v G_v)``, ``G_u = dD/dp_u`` up to a
constant. With ``m`` the mixture of the kind:

    kind             D                                     p_u G_u                            forward collectives
    reverse          KL(p || q)                            p_u log(p_u / q_u)                 1
    forward          KL(q || p)                            -q_u                               1
    jsd              b KL(q || m) + (1-b) KL(p || m)       (1-b) p_u log(p_u / m_u)           2
                     m = b q + (1-b) p
    skew_forward     KL(q || m), m = a q + (1-a) p         -(1-a) p_u q_u / m_u               2
    skew_reverse     KL(p || m), m = (1-a) q + a sg[p]     p_u log(p_u / m_u)                 2

The first collective gathers the statistics of both models (8 numbers per token and rank, `statistics`), the second adds
up two sums that can only be formed once both are normalised. Backward adds none. Sources: generalised JSD arXiv
2306.13649, skew divergences arXiv 2503.07067 (DistiLLM-2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_opd.vocab import collectives
from nemo_opd.vocab.chunk import Chunk, ChunkResult, Method, standard_metrics
from nemo_opd.vocab.kernels import kernels_for
from nemo_opd.vocab.objective import Evaluation, FullDivergence
from nemo_opd.vocab.statistics import Scratch, Statistics, combine, local_statistics, row_blocks, row_dot
from nemo_opd.vocab.support import FewLogProbs

TINY = 1e-37
"""Least probability, and least ratio of probabilities, whose logarithm is taken: it is then multiplied by a probability
that is as small."""


def keep_for(spec: FullDivergence) -> str:
    """What the statistics leave in the buffers for this divergence."""
    return "ratio" if spec.kind == "reverse" else "softmaxes"


def divergence_chunk(chunk: Chunk, spec: FullDivergence) -> Method:
    """Value and gradient of one chunk. The student's buffer ends up holding the gradient; the teacher's is used up."""
    student, teacher = chunk.student, chunk.teacher
    assert teacher is not None
    fields, maxima = local_statistics(student, teacher, chunk.tokens.ids, chunk.shard, chunk.scratch, keep_for(spec))
    pending = collectives.start_gather(fields, chunk.shard.group)
    yield pending
    found = combine(pending.wait())
    assert found.kl is not None and found.forward_kl is not None and found.teacher_logsumexp is not None
    sums = None
    if spec.mixes:
        parts = _mixture_sums(chunk, found, maxima, spec)
        pending = collectives.start_all_reduce(parts, chunk.shard.group)
        yield pending
        sums = pending.wait()
    value, inner = _value(found, sums, spec)
    scores = chunk.scores(found)
    weights, metrics = chunk.weights(scores)
    name = chunk.objective.components[0]
    beside, pull = _beside(chunk, found, weights)
    if chunk.gradient:
        coefficient = weights[name] * (chunk.scale / chunk.normalisers[name])
        coefficient = torch.where(chunk.masks[name], coefficient, 0.0)
        if pull is not None:
            inner, coefficient = _with_pull(inner, coefficient, pull)
        _gradient(chunk, found, maxima, inner, coefficient, spec)
        if pull is not None:
            columns, here = chunk.shard.local(chunk.tokens.ids)
            if student.shape[1]:
                student.scatter_add_(1, columns.unsqueeze(1), torch.where(here, pull, 0.0).unsqueeze(1))
    return ChunkResult(
        losses={name: value, **beside.losses},
        weights=weights,
        masks=chunk.masks,
        metrics={**standard_metrics(scores, found.kl, chunk.tokens), **metrics, **beside.metrics},
        dlogits=student if chunk.gradient else None,
    )


def _beside(chunk: Chunk, found: Statistics, weights: dict[str, Tensor]) -> tuple[Evaluation, Tensor | None]:
    """The losses of the written token that stand beside the divergence, and dL/dlog p(y) [tokens] of their sum."""
    if chunk.objective.beside is None:
        return Evaluation({}), None
    with torch.enable_grad():
        leaves = FewLogProbs(None, None, found.student_written).as_leaves(chunk.gradient)
        evaluation = chunk.objective.beside.evaluate_few(leaves, None, None, chunk.tokens, None)
        total = chunk.total(evaluation.losses, weights)
    pull = leaves.gradients(total).written if chunk.gradient else None
    return Evaluation({name: loss.detach() for name, loss in evaluation.losses.items()}, evaluation.metrics), pull


_LEAST_SHARE = 1e-15
"""Of a divergence that does not count, in the gradient of a token whose written token does: below any rounding."""


def _with_pull(inner: Tensor, coefficient: Tensor, pull: Tensor) -> tuple[Tensor, Tensor]:
    """(inner, coefficient) for which ``coefficient (p G - p inner)`` has ``- pull p`` in it: dlog p_y / dz_u is
    [u = y] - p_u, and the part with p_u takes no pass of its own this way."""
    coefficient = torch.where(coefficient == 0.0, pull.abs() * _LEAST_SHARE, coefficient)
    return inner + torch.where(pull == 0.0, 0.0, pull / coefficient), coefficient


def _value(found: Statistics, sums: Tensor | None, spec: FullDivergence) -> tuple[Tensor, Tensor]:
    """(D, sum of p G) per token."""
    assert found.kl is not None and found.forward_kl is not None
    if spec.kind == "reverse":
        return found.kl, found.kl
    if spec.kind == "forward":
        return found.forward_kl, torch.full_like(found.kl, -1.0)
    assert sums is not None
    if spec.kind == "jsd":
        return spec.mix * sums[1] + (1.0 - spec.mix) * sums[0], (1.0 - spec.mix) * sums[0]
    return (sums[1], sums[0]) if spec.kind == "skew_forward" else (sums[0], sums[0])


def _mixture_sums(chunk: Chunk, found: Statistics, maxima: Tensor, spec: FullDivergence) -> Tensor:
    """[2, tokens] over this rank's columns: sum of p log(p/m) and of q log(q/m); for skew_forward the first is
    sum of p G = -(1-a) sum of p q / m."""
    student, teacher = chunk.student, chunk.teacher
    assert teacher is not None
    if student.shape[1] == 0:
        return student.new_zeros(2, student.shape[0])
    if (kernels := kernels_for(student)) is not None:
        return kernels.mixture_sums(
            student, teacher, found.student_logsumexp, found.teacher_logsumexp, spec.kind, spec.mix, spec.teacher_share
        )
    return eager_mixture_sums(student, teacher, found, maxima, spec, chunk.scratch)


def eager_mixture_sums(
    student: Tensor,
    teacher: Tensor,
    found: Statistics,
    maxima: Tensor,
    spec: FullDivergence,
    scratch: Scratch,
) -> Tensor:
    """The same from what the statistics left; leaves p and log(p/m) (skew_forward: p G) in the buffers."""
    assert found.teacher_logsumexp is not None
    sums = student.new_zeros(2, student.shape[0])
    p_scale = (maxima[0] - found.student_logsumexp).exp().unsqueeze(1)
    q_scale = (maxima[1] - found.teacher_logsumexp).exp().unsqueeze(1)
    for rows in row_blocks(student):
        p, q = student[rows].mul_(p_scale[rows]), teacher[rows].mul_(q_scale[rows])
        spare = scratch.take(0, p)
        m = torch.lerp(p, q, spec.teacher_share, out=scratch.take(1, p)).clamp_(min=TINY)
        if spec.kind != "skew_reverse":
            q_over_m = torch.div(q, m, out=scratch.take(2, p)).clamp_(min=TINY)
            sums[1, rows] = row_dot(q, q_over_m.log_(), spare)
        if spec.kind == "skew_forward":
            p_times_g = torch.div(q.mul_(p), m, out=q).mul_(spec.mix - 1.0)
            sums[0, rows] = p_times_g.sum(1)
        else:
            log_p_over_m = torch.div(p, m, out=q).clamp_(min=TINY).log_()
            sums[0, rows] = row_dot(p, log_p_over_m, spare)
    return sums


def _gradient(
    chunk: Chunk, found: Statistics, maxima: Tensor, inner: Tensor, coefficient: Tensor, spec: FullDivergence
) -> None:
    """student <- coefficient (p G - p inner)"""
    student, teacher = chunk.student, chunk.teacher
    assert teacher is not None
    if student.shape[1] == 0:
        return
    if (kernels := kernels_for(student)) is not None:
        kernels.gradient(
            student, teacher, found.student_logsumexp, found.teacher_logsumexp, inner, coefficient, spec.kind, spec.mix,
            spec.teacher_share,
        )  # fmt: skip
    else:
        eager_gradient(student, teacher, found, maxima, inner, coefficient, spec)


def eager_gradient(
    student: Tensor,
    teacher: Tensor,
    found: Statistics,
    maxima: Tensor,
    inner: Tensor,
    coefficient: Tensor,
    spec: FullDivergence,
) -> None:
    """The same from what the statistics (reverse, forward) or the mixture sums left in the buffers: no exponential and
    no logarithm of their size is left to take."""
    assert found.teacher_logsumexp is not None
    # exp(z - m) times this is p: m and the normaliser are of the rank and of the whole.
    p_scale = (maxima[0] - found.student_logsumexp).exp() * coefficient
    q_scale = (maxima[1] - found.teacher_logsumexp).exp() * coefficient
    shift = (maxima[0] - found.student_logsumexp) - (maxima[1] - found.teacher_logsumexp) - inner
    share = 1.0 - spec.mix if spec.kind == "jsd" else 1.0
    for rows in row_blocks(student):
        first, second = student[rows], teacher[rows]
        if spec.kind == "reverse":
            first.mul_(second.add_(shift[rows].unsqueeze(1)).mul_(p_scale[rows].unsqueeze(1)))
        elif spec.kind == "forward":
            first.mul_((p_scale * -inner)[rows].unsqueeze(1)).sub_(second.mul_(q_scale[rows].unsqueeze(1)))
        elif spec.kind == "skew_forward":
            torch.sub(second, first.mul_(inner[rows].unsqueeze(1)), out=first).mul_(coefficient[rows].unsqueeze(1))
        else:
            scaled = second.mul_(share * coefficient[rows].unsqueeze(1))
            first.mul_(scaled.sub_((inner * coefficient)[rows].unsqueeze(1)))
