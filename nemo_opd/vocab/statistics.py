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

from nemo_opd.vocab.kernels import kernels_for
from nemo_opd.vocab.shard import VocabShard

CACHED_ELEMENTS = 1 << 19
"""Elements of one tensor that are worked on at a time on the CPU (two megabytes in float32): few enough for a shared
cache, many enough that threads seldom wait for each other."""


def row_blocks(logits: Tensor) -> Iterator[slice]:
    """Rows of a chunk, a cache-sized block at a time on the CPU, all at once elsewhere."""
    rows = logits.shape[0]
    step = rows if logits.device.type != "cpu" else max(1, CACHED_ELEMENTS // max(1, logits.shape[1]))
    for start in range(0, rows, max(1, step)):
        yield slice(start, start + step)


class Scratch:
    """A few cache-sized blocks that are used again and again: fresh memory costs page faults, which on the CPU take
    longer than the arithmetic."""

    def __init__(self) -> None:
        self._blocks: dict[int, Tensor] = {}

    def take(self, number: int, like: Tensor) -> Tensor:
        """Block `number`, of the shape of `like`; its contents are whatever was left there."""
        block = self._blocks.get(number)
        if block is None or block.shape[0] < like.shape[0] or block.shape[1:] != like.shape[1:]:
            block = self._blocks[number] = torch.empty_like(like, memory_format=torch.contiguous_format)
        return block[: like.shape[0]]


def row_dot(a: Tensor, b: Tensor, spare: Tensor) -> Tensor:
    """sum over columns of a * b, [tokens]; `spare` is overwritten."""
    return torch.mul(a, b, out=spare).sum(1)


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
    """KL(q || p), where it was asked for"""


KEEP = ("logits", "ratio", "softmaxes")
"""What the buffers hold after the statistics: the logits as before; or, centred on this rank's maxima m, exp(z_p - m_p)
and the log-ratio (z_p - m_p) - (z_q - m_q); or exp(z_p - m_p) and exp(z_q - m_q). Saves exponentials in backward."""


def local_statistics(
    student: Tensor,
    teacher: Tensor | None,
    ids: Tensor,
    shard: VocabShard,
    scratch: Scratch | None = None,
    keep: str = "logits",
) -> tuple[Tensor, Tensor]:
    """([3 or 8, tokens], [2, tokens]) of this rank's columns.

    First logsumexp, conditional entropy and the written token's logit (0 where another rank holds it) of the student,
    the same of the teacher, and the conditional divergences KL(p || q) and KL(q || p) (the latter 0 unless `keep` is
    "softmaxes": only who minimises it pays for it); then the maxima, which only the eager functions know.
    """
    fields, maxima = student.new_zeros(3 if teacher is None else 8, student.shape[0]), student.new_zeros(2, len(ids))
    if shard.valid == 0:
        fields[0].fill_(-torch.inf)
        if teacher is not None:
            fields[3].fill_(-torch.inf)
        return fields, maxima
    columns, here = shard.local(ids)
    for field, logits in ((2, student), (5, teacher)):
        if logits is not None:
            fields[field] = torch.where(here, logits.gather(1, columns.unsqueeze(1)).squeeze(1), 0.0)
    if (kernels := kernels_for(student)) is not None:
        kernels.statistics(student, teacher, fields)
    else:
        eager_statistics(student, teacher, fields, maxima, scratch or Scratch(), keep)
    return fields, maxima


def eager_statistics(
    student: Tensor, teacher: Tensor | None, fields: Tensor, maxima: Tensor, scratch: Scratch, keep: str = "logits"
) -> None:
    """Fill `fields` [3 or 8, tokens], except what concerns the written tokens, and `maxima` [2, tokens]."""
    assert keep in KEEP
    for rows in row_blocks(student):
        other = None if teacher is None else teacher[rows]
        _row_statistics(student[rows], other, fields[:, rows], maxima[:, rows], scratch, keep)


def _row_statistics(
    student: Tensor, teacher: Tensor | None, out: Tensor, maxima: Tensor, scratch: Scratch, keep: str
) -> None:
    spare = scratch.take(0, student)
    maxima[0] = student.amax(1)
    centred_p = torch.sub(student, maxima[0].unsqueeze(1), out=scratch.take(1, student))
    e_p = torch.exp(centred_p, out=scratch.take(2, student) if keep == "logits" else student)
    sum_p = e_p.sum(1)
    log_sum_p = sum_p.log()
    out[0] = maxima[0] + log_sum_p
    out[1] = log_sum_p - row_dot(e_p, centred_p, spare) / sum_p
    if teacher is None:
        return
    maxima[1] = teacher.amax(1)
    centred_q = torch.sub(teacher, maxima[1].unsqueeze(1), out=teacher if keep == "ratio" else scratch.take(3, student))
    e_q = torch.exp(centred_q, out=teacher if keep == "softmaxes" else scratch.take(4, student))
    sum_q = e_q.sum(1)
    log_sum_q = sum_q.log()
    out[3] = maxima[1] + log_sum_q
    out[4] = log_sum_q - row_dot(e_q, centred_q, spare) / sum_q
    ratio = torch.sub(centred_p, centred_q, out=centred_q)
    out[6] = row_dot(e_p, ratio, spare) / sum_p - log_sum_p + log_sum_q
    if keep == "softmaxes":
        out[7] = log_sum_p - log_sum_q - row_dot(e_q, ratio, spare) / sum_q


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


def blocked_logsumexp(logits: Tensor, scratch: Scratch | None = None) -> Tensor:
    """logsumexp over this rank's columns, [tokens], a block of rows at a time; -inf where all of them are -inf."""
    if (kernels := kernels_for(logits)) is not None:
        fields = logits.new_empty(3, logits.shape[0])
        kernels.statistics(logits, None, fields)
        return fields[0]
    result, scratch = logits.new_empty(logits.shape[0]), scratch or Scratch()
    for rows in row_blocks(logits):
        top = logits[rows].amax(1).clamp_(min=torch.finfo(logits.dtype).min)
        centred = torch.sub(logits[rows], top.unsqueeze(1), out=scratch.take(0, logits[rows]))
        result[rows] = centred.exp_().sum(1).log_().add_(top)
    return result
