"""The Triton kernels in Triton's interpreter on the CPU, against the eager functions that they replace on a GPU.

Run by `test_triton_kernels`, in a process of its own: Triton reads TRITON_INTERPRET when it is first imported.
"""

from __future__ import annotations

import pytest
import torch

from nemo_opd.vocab import triton_kernels
from nemo_opd.vocab.divergence import eager_gradient, eager_mixture_sums, keep_for
from nemo_opd.vocab.objective import FullDivergence
from nemo_opd.vocab.reduced import eager_scaled_softmax
from nemo_opd.vocab.shard import dense_shard
from nemo_opd.vocab.statistics import Scratch, combine, eager_statistics, local_statistics

KINDS = [
    FullDivergence("reverse"),
    FullDivergence("forward"),
    FullDivergence("jsd", 0.3),
    FullDivergence("skew_forward", 0.1),
    FullDivergence("skew_reverse", 0.1),
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks per row, the last one ragged."""
    monkeypatch.setattr(triton_kernels, "BLOCK", 64)


def logits(columns: int = 150, scale: float = 4.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(3, columns, generator=generator) * scale
    student[1, 100:] += 30.0  # the maximum grows from block to block
    return student, torch.randn(3, columns, generator=generator) * scale


@pytest.mark.parametrize("scale", [4.0, 25.0])
def test_statistics(scale):
    student, teacher = logits(scale=scale)
    for other, fields in ((teacher, 8), (None, 3)):
        got, expected = torch.zeros(fields, 3), torch.zeros(fields, 3)
        triton_kernels.statistics(student, other, got)
        eager_statistics(
            student.clone(),
            teacher.clone() if other is not None else None,
            expected,
            torch.zeros(2, 3),
            Scratch(),
            "softmaxes",
        )
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


def test_statistics_of_columns_that_are_left_out():
    student, _ = logits()
    student[:, 10:80] = -torch.inf
    got = torch.zeros(3, 3)
    triton_kernels.statistics(student, None, got)
    torch.testing.assert_close(got[0], student.logsumexp(1))


@pytest.mark.parametrize("spec", KINDS, ids=lambda s: s.kind)
def test_mixture_sums_and_gradient(spec):
    student, teacher = logits()
    written = torch.zeros(3, dtype=torch.int64)
    keep = keep_for(spec)
    expected, theirs = student.clone(), teacher.clone()
    fields, maxima = local_statistics(expected, theirs, written, dense_shard(150), keep=keep)
    found = combine(fields.unsqueeze(0))
    inner, coefficient = torch.tensor([0.3, -0.2, 1.0]), torch.tensor([1.0, 0.0, 0.25])
    lse = (found.student_logsumexp, found.teacher_logsumexp)
    if spec.mixes:
        got = triton_kernels.mixture_sums(student, teacher, *lse, spec.kind, spec.mix, spec.teacher_share)
        sums = eager_mixture_sums(expected, theirs, found, maxima, spec, Scratch())
        rows = 1 if spec.kind == "skew_reverse" else 2
        torch.testing.assert_close(got[:rows], sums[:rows], rtol=2e-5, atol=2e-6)
    eager_gradient(expected, theirs, found, maxima, inner, coefficient, spec)
    triton_kernels.gradient(student, teacher, *lse, inner, coefficient, spec.kind, spec.mix, spec.teacher_share)
    torch.testing.assert_close(student, expected, rtol=2e-5, atol=2e-6)


def test_scaled_softmax():
    student, _ = logits()
    factor, lse = torch.tensor([1.0, -2.0, 0.5]), student.logsumexp(1)
    expected = student.clone()
    eager_scaled_softmax(expected, lse, factor)
    triton_kernels.gradient(student, None, lse, None, None, factor, "scaled_softmax")
    torch.testing.assert_close(student, expected, rtol=2e-5, atol=2e-6)
