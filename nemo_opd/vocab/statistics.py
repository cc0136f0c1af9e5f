"""What one pass over the logits of a chunk says about both models, on this rank and over all ranks.

A rank sees its own columns only. It describes them by its *conditional* distribution (the softmax over its columns) and
by the logsumexp of its columns, which says how much of the whole it holds. The whole follows by the chain rule,

    H(p) = sum_r w_r (H_r - log w_r)            KL(p || q) = sum_r w_r (KL_r + log w_r - log u_r)

with ``w_r``, ``u_r`` the shares of rank r under student and teacher. So a single gather of a few numbers per token
makes normalisers, entropies, divergences and the log-probabilities of the written tokens whole; a maximum and a sum
would need two, one after the other. All terms are centred: a constant added to a model's logits drops out before
anything is exponentiated.

On the CPU rows are worked on a few at a time, so that everything after the first read happens in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_opd.vocab.collectives import local_logsumexp
from nemo_opd.vocab.kernels import kernels_for
from nemo_opd.vocab.shard import VocabShard

CACHED_ELEMENTS = 1 << 17
"""Elements of one tensor that are worked on at a time on the CPU (half a megabyte in float32)."""


def row_blocks(logits: Tensor) -> Iterator[slice]:
    """Rows of a chunk, a cache-sized block at a time on the CPU, all at once elsewhere."""
    rows = logits.shape[0]
    step = rows if logits.device.type != "cpu" else max(1, CACHED_ELEMENTS // max(1, logits.shape[1]))
    for start in range(0, rows, max(1, step)):
        yield slice(start, start + step)


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """sum over columns of a * b, [tokens], without a third tensor of their size."""
    return torch.bmm(a.unsqueeze(1), b.unsqueeze(2)).view(-1)


STUDENT_FIELDS = ("logsumexp", "entropy", "written")
TEACHER_FIELDS = ("logsumexp", "entropy", "written", "kl", "forward_kl")


@dataclass(frozen=True)
class Statistics:
    """Of the whole vocabulary, per token, equal on all ranks; float tensors [tokens]."""

    student_logsumexp: Tensor
    student_entropy: Tensor
    student_written: Tensor
    """log p of the written token"""
    teacher_logsumexp: Tensor | None = None
    teacher_entropy: Tensor | None = None
    teacher_written: Tensor | None = None
    kl: Tensor | None = None
    """KL(p || q)"""
    forward_kl: Tensor | None = None
    """KL(q || p)"""


def local_statistics(student: Tensor, teacher: Tensor | None, ids: Tensor, shard: VocabShard) -> Tensor:
    """[3 or 8, tokens] of this rank's columns: logsumexp, conditional entropy and the written token's logit (0 where
    another rank holds it) of the student, the same of the teacher, and both conditional KL divergences."""
    fields = student.new_zeros(3 if teacher is None else 8, student.shape[0])
    if shard.valid == 0:
        fields[0].fill_(-torch.inf)
        if teacher is not None:
            fields[3].fill_(-torch.inf)
        return fields
    if (kernels := kernels_for(student)) is not None:
        kernels.statistics(student, teacher, fields)
    else:
        eager_statistics(student, teacher, fields)
    columns, here = shard.local(ids)
    for field, logits in ((2, student), (5, teacher)):
        if logits is not None:
            fields[field] = torch.where(here, logits.gather(1, columns.unsqueeze(1)).squeeze(1), 0.0)
    return fields


def eager_statistics(student: Tensor, teacher: Tensor | None, fields: Tensor) -> None:
    """Fill `fields` [3 or 8, tokens], except what concerns the written tokens."""
    for rows in row_blocks(student):
        _row_statistics(student[rows], None if teacher is None else teacher[rows], fields[:, rows])


def _row_statistics(student: Tensor, teacher: Tensor | None, out: Tensor) -> None:
    centred_p, e_p, sum_p, top_p = _softmax_parts(student)
    log_sum_p = sum_p.log()
    out[0] = top_p + log_sum_p
    out[1] = log_sum_p - row_dot(e_p, centred_p) / sum_p
    if teacher is None:
        return
    centred_q, e_q, sum_q, top_q = _softmax_parts(teacher)
    log_sum_q = sum_q.log()
    out[3] = top_q + log_sum_q
    out[4] = log_sum_q - row_dot(e_q, centred_q) / sum_q
    difference = centred_p.sub_(centred_q)
    out[6] = row_dot(e_p, difference) / sum_p - log_sum_p + log_sum_q
    out[7] = log_sum_p - log_sum_q - row_dot(e_q, difference) / sum_q


def _softmax_parts(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(z - max, exp of that, its sum, max)"""
    top = logits.amax(1)
    centred = logits - top.unsqueeze(1)
    exponentials = centred.exp()
    return centred, exponentials, exponentials.sum(1), top


def combine(fields: Tensor) -> Statistics:
    """Make the statistics of all ranks [ranks, 3 or 8, tokens] whole."""
    student_lse, student_log_share, student_share = _shares(fields[:, 0])
    student = (
        student_lse,
        (student_share * (fields[:, 1] - student_log_share)).sum(0),
        fields[:, 2].sum(0) - student_lse,
    )
    if fields.shape[1] == 3:
        return Statistics(*student)
    teacher_lse, teacher_log_share, teacher_share = _shares(fields[:, 3])
    difference = student_log_share - teacher_log_share
    return Statistics(
        *student,
        teacher_logsumexp=teacher_lse,
        teacher_entropy=(teacher_share * (fields[:, 4] - teacher_log_share)).sum(0),
        teacher_written=fields[:, 5].sum(0) - teacher_lse,
        kl=(student_share * (fields[:, 6] + difference)).sum(0),
        forward_kl=(teacher_share * (fields[:, 7] - difference)).sum(0),
    )


def _shares(local: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From the logsumexp of each rank [ranks, tokens]: that of the whole [tokens], log of each rank's share (0 for a
    rank that holds no ids, whose share is 0) and the share."""
    whole = local.logsumexp(0)
    log_share = local - whole
    return whole, torch.where(log_share.isfinite(), log_share, 0.0), log_share.exp()


def blocked_logsumexp(logits: Tensor) -> Tensor:
    """logsumexp over this rank's columns, [tokens], a block of rows at a time."""
    if (kernels := kernels_for(logits)) is not None:
        fields = logits.new_empty(3, logits.shape[0])
        kernels.statistics(logits, None, fields)
        return fields[0]
    return torch.cat([local_logsumexp(logits[rows]) for rows in row_blocks(logits)] or [logits.new_empty(0)])
