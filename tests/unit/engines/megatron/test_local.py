"""The local kernels against their definitions, in float64, gradients included."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_opd.engines.megatron.eager import rms_norm, rotate, swiglu
from nemo_opd.engines.megatron.local import PackedAttention, RMSNorm, attention_inputs
from nemo_opd.engines.megatron.rows import runs_of

HEADS, GROUPS, HEAD_DIM = 4, 2, 8


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """The definition: x [row, heads, head_dim] as complex numbers (x_i, x_{i + head_dim / 2}) times exp(i angle)."""
    first, second = x.chunk(2, dim=-1)
    product = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([product.real, product.imag], dim=-1)


def dense_attention(query: Tensor, key: Tensor, value: Tensor, angles: Tensor, bounds: Tensor) -> Tensor:
    """The definition: a softmax over the positions of the same sequence that are not later."""
    query, key = turned(query, angles), turned(key, angles)
    position = torch.arange(len(query))
    sequence = torch.bucketize(position, bounds[1:], right=True)
    seen = (sequence[:, None] == sequence[None]) & (position[:, None] >= position[None])
    key, value = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) / HEAD_DIM**0.5
    probabilities = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", probabilities, value).flatten(1)


def check_equal(got: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    """In value and in gradient with respect to every input."""
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
    weights = torch.randn_like(expected)
    ours = torch.autograd.grad((got * weights).sum(), inputs)
    theirs = torch.autograd.grad((expected * weights).sum(), inputs)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-12, rtol=0)


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("lengths", [(7,), (5, 5, 5), (3, 1, 9, 4, 4), (20, 2, 11)])
def test_attention_stays_within_its_sequence(lengths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    row = int(bounds[-1])
    inputs = [leaf(row, 1, heads, HEAD_DIM) for heads in (HEADS, GROUPS, GROUPS)]
    angles = torch.randn(row, HEAD_DIM // 2, dtype=torch.float64)
    config: Any = SimpleNamespace(kv_channels=HEAD_DIM)
    known = attention_inputs(runs_of(bounds.diff()), torch.cat([angles, angles], -1)[:, None, None], torch.float64)
    got = PackedAttention(config)(*inputs, known)
    assert got.shape == (row, 1, HEADS * HEAD_DIM)
    expected = dense_attention(*(x.squeeze(1) for x in inputs), angles, bounds)
    check_equal(got.squeeze(1), expected, inputs)


def test_rotation_leaves_its_input() -> None:
    x, angles = leaf(6, 3, HEAD_DIM), torch.randn(6, HEAD_DIM // 2, dtype=torch.float64)
    before = x.detach().clone()
    cos = torch.cat([angles, angles], -1).cos()[:, None]
    check_equal(rotate(x, cos, angles.sin()[:, None]), turned(x, angles), [x])
    assert torch.equal(x, before)


@pytest.mark.parametrize("shape", [(5, 6), (7, 1, 2, 6)])
def test_norm_of_any_shape(shape: tuple[int, ...]) -> None:
    x, weight = leaf(*shape), leaf(shape[-1])
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    check_equal(rms_norm(x, weight, 1e-5), expected, [x, weight])


def test_norm_of_a_part_of_a_tensor() -> None:
    """Query and key are parts of one product."""
    x, weight = leaf(5, 3, 10), leaf(4)
    part = x[..., 2:6]
    expected = part / (part.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    check_equal(rms_norm(part, weight, 1e-5), expected, [x, weight])


def test_norm_in_half_precision_sums_in_single() -> None:
    x = torch.full((2, 4096), 3.0, dtype=torch.bfloat16)
    assert rms_norm(x, torch.ones(4096, dtype=torch.bfloat16), 0.0).eq(1.0).all()


def test_activation() -> None:
    x = leaf(5, 1, 12)
    gate, up = x.chunk(2, dim=-1)
    expected = gate * gate.sigmoid() * up
    check_equal(swiglu(x), expected, [x])
    with torch.no_grad():
        torch.testing.assert_close(swiglu(x.detach().clone()), expected, atol=1e-12, rtol=0)


def test_norm() -> None:
    config: Any = SimpleNamespace(params_dtype=torch.float64, sequence_parallel=True, use_cpu_initialization=True)
    norm = RMSNorm(config, hidden_size=6, eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(5, 6, dtype=torch.float64)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected, atol=1e-14, rtol=1e-14)
    assert norm.weight.sequence_parallel, "Megatron sums its gradient over tensor ranks by this mark"
