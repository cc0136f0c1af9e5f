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
from nemo_opd.vocab.objective import FullDivergence
from nemo_opd.vocab.statistics import Statistics, combine, local_statistics, row_blocks, row_dot

TINY = 1e-37
"""Least mixture probability whose logarithm is taken; what lies below is smaller than any number that meets it."""


def divergence_chunk(chunk: Chunk, spec: FullDivergence) -> Method:
    """Value and gradient of one chunk. The student's buffer ends up holding the gradient; the teacher's is used up."""
    student, teacher = chunk.student, chunk.teacher
    assert teacher is not None
    pending = collectives.start_gather(
        local_statistics(student, teacher, chunk.tokens.ids, chunk.shard), chunk.shard.group
    )
    yield pending
    found = combine(pending.wait())
    assert found.kl is not None and found.forward_kl is not None and found.teacher_logsumexp is not None
    sums = None
    if spec.mixes:
        parts = _mixture_sums(student, teacher, found, spec)
        pending = collectives.start_all_reduce(parts, chunk.shard.group)
        yield pending
        sums = pending.wait()
    value, inner = _value(found, sums, spec)
    scores = chunk.scores(found)
    weights, metrics = chunk.weights(scores)
    (name,) = chunk.objective.components
    if chunk.gradient:
        coefficient = weights[name] * (chunk.scale / chunk.normalisers[name])
        coefficient = torch.where(chunk.masks[name], coefficient, 0.0)
        _gradient(student, teacher, found, inner, coefficient, spec)
    return ChunkResult(
        losses={name: value},
        weights=weights,
        masks=chunk.masks,
        metrics={**standard_metrics(scores, found.kl, chunk.tokens), **metrics},
        dlogits=student if chunk.gradient else None,
    )


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


def _log_parts(
    student: Tensor, teacher: Tensor, found: Statistics, rows: slice, spec: FullDivergence
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(p, q, log p, log q, log m) of some rows."""
    assert found.teacher_logsumexp is not None
    log_p = student[rows] - found.student_logsumexp[rows].unsqueeze(1)
    log_q = teacher[rows] - found.teacher_logsumexp[rows].unsqueeze(1)
    p, q = log_p.exp(), log_q.exp()
    log_m = torch.lerp(p, q, spec.teacher_share).clamp_min_(TINY).log_()
    return p, q, log_p, log_q, log_m


def _mixture_sums(student: Tensor, teacher: Tensor, found: Statistics, spec: FullDivergence) -> Tensor:
    """[2, tokens] over this rank's columns: sum of p log(p/m) and of q log(q/m); for skew_forward the first is
    sum of p G = -(1-a) sum of p q / m."""
    if student.shape[1] == 0:
        return student.new_zeros(2, student.shape[0])
    if (kernels := kernels_for(student)) is not None:
        return kernels.mixture_sums(
            student, teacher, found.student_logsumexp, found.teacher_logsumexp, spec.kind, spec.mix, spec.teacher_share
        )
    return eager_mixture_sums(student, teacher, found, spec)


def eager_mixture_sums(student: Tensor, teacher: Tensor, found: Statistics, spec: FullDivergence) -> Tensor:
    sums = student.new_zeros(2, student.shape[0])
    for rows in row_blocks(student):
        p, q, log_p, log_q, log_m = _log_parts(student, teacher, found, rows, spec)
        if spec.kind == "skew_forward":
            sums[0, rows] = row_dot(log_p.sub_(log_m).exp_(), q).mul_(spec.mix - 1.0)
        else:
            sums[0, rows] = row_dot(p, log_p.sub_(log_m))
        if spec.kind != "skew_reverse":
            sums[1, rows] = row_dot(q, log_q.sub_(log_m))
    return sums


def _gradient(
    student: Tensor, teacher: Tensor, found: Statistics, inner: Tensor, coefficient: Tensor, spec: FullDivergence
) -> None:
    """student <- coefficient (p G - p inner)"""
    if student.shape[1] == 0:
        return
    if (kernels := kernels_for(student)) is not None:
        kernels.gradient(
            student, teacher, found.student_logsumexp, found.teacher_logsumexp, inner, coefficient, spec.kind, spec.mix,
            spec.teacher_share,
        )  # fmt: skip
    else:
        eager_gradient(student, teacher, found, inner, coefficient, spec)


def eager_gradient(
    student: Tensor, teacher: Tensor, found: Statistics, inner: Tensor, coefficient: Tensor, spec: FullDivergence
) -> None:
    for rows in row_blocks(student):
        z, factor, centre = student[rows], coefficient[rows].unsqueeze(1), inner[rows].unsqueeze(1)
        if spec.kind == "reverse":
            assert found.teacher_logsumexp is not None
            shift = (found.teacher_logsumexp - found.student_logsumexp)[rows].unsqueeze(1) - centre
            log_ratio = torch.sub(z, teacher[rows], out=teacher[rows]).add_(shift).mul_(factor)
            z.sub_(found.student_logsumexp[rows].unsqueeze(1)).exp_().mul_(log_ratio)
        elif spec.kind == "forward":
            assert found.teacher_logsumexp is not None
            q = teacher[rows].sub_(found.teacher_logsumexp[rows].unsqueeze(1)).exp_()
            z.sub_(found.student_logsumexp[rows].unsqueeze(1)).exp_().sub_(q).mul_(factor)
        else:
            p, q, log_p, _, log_m = _log_parts(student, teacher, found, rows, spec)
            if spec.kind == "skew_forward":
                inside = log_p.sub_(log_m).exp_().mul_(q).mul_(spec.mix - 1.0)
                torch.sub(inside, p.mul_(centre), out=z).mul_(factor)
            else:
                share = 1.0 - spec.mix if spec.kind == "jsd" else 1.0
                log_p.sub_(log_m).mul_(share).sub_(centre).mul_(factor)
                torch.mul(p, log_p, out=z)
