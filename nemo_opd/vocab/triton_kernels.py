"""The element-wise part of the fused path on a GPU: three kernels, one program per token, logits in float32.

    statistics      forward, 1 read of both models' logits: maximum, sum, entropy and divergence sums, online
    mixture_sums    forward of Jensen-Shannon and skew divergences, 1 more read
    gradient        backward, 1 read and 1 write: the gradient over the student's logits

The eager functions of `statistics`, `divergence` and `reduced` compute the same, are what runs on the CPU, and are what
these kernels are tested against (in Triton's interpreter, where there is no GPU). `nemo_opd.vocab.kernels` chooses.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Columns that a program works on at a time."""

MODES = {"reverse": 0, "forward": 1, "jsd": 2, "skew_forward": 3, "skew_reverse": 4, "scaled_softmax": 5}


@triton.jit
def _statistics(
    student, teacher, out, stride_s, stride_t, stride_out, columns, HAS_TEACHER: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    student += row * stride_s
    teacher += row * stride_t
    # Sums over exp(z - m) with the maximum m so far; when m grows by d, sums of e^(z-m) shrink by e^-d and centred
    # terms (z - m) lose d. A finite start keeps inf - inf away.
    m_p = tl.full((), -1e30, tl.float32)
    m_q = tl.full((), -1e30, tl.float32)
    s_p = tl.zeros((), tl.float32)
    s_q = tl.zeros((), tl.float32)
    a_p = tl.zeros((), tl.float32)
    a_q = tl.zeros((), tl.float32)
    k_p = tl.zeros((), tl.float32)
    k_q = tl.zeros((), tl.float32)
    for start in range(0, columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < columns
        z_p = tl.load(student + offsets, mask=inside, other=-float("inf"))
        new_p = tl.maximum(m_p, tl.max(z_p, 0))
        d_p = m_p - new_p
        m_p = new_p
        kept = z_p > -float("inf")  # neither past the end nor a column that is left out
        c_p = tl.where(kept, z_p - m_p, 0.0)
        e_p = tl.where(kept, tl.exp(c_p), 0.0)
        if HAS_TEACHER:
            z_q = tl.load(teacher + offsets, mask=inside, other=-float("inf"))
            new_q = tl.maximum(m_q, tl.max(z_q, 0))
            d_q = m_q - new_q
            m_q = new_q
            c_q = tl.where(inside, z_q - m_q, 0.0)
            e_q = tl.where(inside, tl.exp(c_q), 0.0)
            k_p = tl.exp(d_p) * (k_p + (d_p - d_q) * s_p) + tl.sum(e_p * (c_p - c_q), 0)
            k_q = tl.exp(d_q) * (k_q + (d_p - d_q) * s_q) + tl.sum(e_q * (c_p - c_q), 0)
            a_q = tl.exp(d_q) * (a_q + d_q * s_q) + tl.sum(e_q * c_q, 0)
            s_q = tl.exp(d_q) * s_q + tl.sum(e_q, 0)
        a_p = tl.exp(d_p) * (a_p + d_p * s_p) + tl.sum(e_p * c_p, 0)
        s_p = tl.exp(d_p) * s_p + tl.sum(e_p, 0)
    log_s_p = tl.log(s_p)
    tl.store(out + row, m_p + log_s_p)
    tl.store(out + stride_out + row, log_s_p - a_p / s_p)
    if HAS_TEACHER:
        log_s_q = tl.log(s_q)
        tl.store(out + 3 * stride_out + row, m_q + log_s_q)
        tl.store(out + 4 * stride_out + row, log_s_q - a_q / s_q)
        tl.store(out + 6 * stride_out + row, k_p / s_p - log_s_p + log_s_q)
        tl.store(out + 7 * stride_out + row, log_s_p - log_s_q - k_q / s_q)


@triton.jit
def _log_parts(student, teacher, offsets, inside, lse_p, lse_q, share):
    log_p = tl.load(student + offsets, mask=inside, other=-float("inf")) - lse_p
    log_q = tl.load(teacher + offsets, mask=inside, other=-float("inf")) - lse_q
    p = tl.exp(log_p)
    q = tl.exp(log_q)
    log_m = tl.log(tl.maximum(p + share * (q - p), 1e-37))
    return tl.where(inside, log_p, 0.0), tl.where(inside, log_q, 0.0), p, q, tl.where(inside, log_m, 0.0)


@triton.jit
def _mixture_sums(
    student, teacher, lse_p, lse_q, out, stride_s, stride_t, stride_out, columns, mix, share,
    MODE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student += row * stride_s
    teacher += row * stride_t
    own_p = tl.load(lse_p + row)
    own_q = tl.load(lse_q + row)
    first = tl.zeros((), tl.float32)
    second = tl.zeros((), tl.float32)
    for start in range(0, columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < columns
        log_p, log_q, p, q, log_m = _log_parts(student, teacher, offsets, inside, own_p, own_q, share)
        if MODE == 3:
            first += (mix - 1.0) * tl.sum(q * tl.exp(log_p - log_m), 0)
        else:
            first += tl.sum(p * (log_p - log_m), 0)
        if MODE != 4:
            second += tl.sum(q * (log_q - log_m), 0)
    tl.store(out + row, first)
    tl.store(out + stride_out + row, second)


@triton.jit
def _gradient(
    student, teacher, lse_p, lse_q, inner, coefficient, stride_s, stride_t, columns, mix, share,
    MODE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student += row * stride_s
    teacher += row * stride_t
    own_p = tl.load(lse_p + row)
    factor = tl.load(coefficient + row)
    if MODE != 5:
        own_q = tl.load(lse_q + row)
        centre = tl.load(inner + row)
    for start in range(0, columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < columns
        if MODE == 5:
            result = tl.exp(tl.load(student + offsets, mask=inside, other=-float("inf")) - own_p)
        elif MODE <= 1:
            log_p = tl.load(student + offsets, mask=inside, other=0.0) - own_p
            log_q = tl.load(teacher + offsets, mask=inside, other=0.0) - own_q
            if MODE == 0:  # noqa: SIM108 - a compile-time branch
                result = tl.exp(log_p) * (log_p - log_q - centre)
            else:
                result = -centre * tl.exp(log_p) - tl.exp(log_q)
        else:
            log_p, log_q, p, q, log_m = _log_parts(student, teacher, offsets, inside, own_p, own_q, share)
            if MODE == 2:
                result = p * ((1.0 - mix) * (log_p - log_m) - centre)
            elif MODE == 3:
                result = (mix - 1.0) * q * tl.exp(log_p - log_m) - p * centre
            else:
                result = p * (log_p - log_m - centre)
        tl.store(student + offsets, result * factor, mask=inside)


def _block(columns: int) -> int:
    return min(BLOCK, triton.next_power_of_2(max(columns, 16)))


def statistics(student: Tensor, teacher: Tensor | None, out: Tensor) -> None:
    """Fill the rows of `out` [3 or 8, tokens] that `nemo_opd.vocab.statistics.local_statistics` describes, except the
    written tokens'. Logits [tokens, columns] float32, columns contiguous."""
    rows, columns = student.shape
    other = student if teacher is None else teacher
    _statistics[(rows,)](
        student, other, out, student.stride(0), other.stride(0), out.stride(0), columns,
        HAS_TEACHER=teacher is not None, BLOCK=_block(columns),
    )  # fmt: skip


def mixture_sums(
    student: Tensor, teacher: Tensor, lse_p: Tensor, lse_q: Tensor, kind: str, mix: float, share: float
) -> Tensor:
    """[2, tokens] as `nemo_opd.vocab.divergence` describes."""
    out = student.new_empty(2, student.shape[0])
    _mixture_sums[(student.shape[0],)](
        student, teacher, lse_p.contiguous(), lse_q.contiguous(), out, student.stride(0), teacher.stride(0),
        out.stride(0), student.shape[1], mix, share, MODE=MODES[kind], BLOCK=_block(student.shape[1]),
    )  # fmt: skip
    return out


def gradient(
    student: Tensor,
    teacher: Tensor | None,
    lse_p: Tensor,
    lse_q: Tensor | None,
    inner: Tensor | None,
    coefficient: Tensor,
    kind: str,
    mix: float = 0.0,
    share: float = 0.0,
) -> None:
    """student <- coefficient (p G - p inner), or coefficient p for ``scaled_softmax`` (which needs no teacher)."""
    other = student if teacher is None else teacher
    unused = coefficient
    _gradient[(student.shape[0],)](
        student, other, lse_p.contiguous(), unused if lse_q is None else lse_q.contiguous(),
        unused if inner is None else inner.contiguous(), coefficient.contiguous(), student.stride(0), other.stride(0),
        student.shape[1], mix, share, MODE=MODES[kind], BLOCK=_block(student.shape[1]),
    )  # fmt: skip
