"""The two local kernels against their definitions, in float64, gradients included."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_opd.engines.megatron.local import PackedAttention, RMSNorm
from nemo_opd.engines.megatron.rows import slots_of

HEADS, GROUPS, HEAD_DIM = 4, 2, 8


def dense_attention(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor) -> Tensor:
    """The definition: a softmax over the positions of the same sequence that are not later."""
    position = torch.arange(len(query))
    sequence = torch.bucketize(position, bounds[1:], right=True)
    seen = (sequence[:, None] == sequence[None]) & (position[:, None] >= position[None])
    key, value = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) / HEAD_DIM**0.5
    probabilities = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", probabilities, value).flatten(1)


@pytest.mark.parametrize("lengths", [(7,), (3, 1, 9, 4, 4), (20, 2, 11)])
def test_attention_stays_within_its_sequence(lengths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    row = int(bounds[-1])
    shapes = [(row, 1, HEADS, HEAD_DIM), (row, 1, GROUPS, HEAD_DIM), (row, 1, GROUPS, HEAD_DIM)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    config: Any = SimpleNamespace(kv_channels=HEAD_DIM)
    got = PackedAttention(config)(*inputs, slots_of(bounds, torch.device("cpu")))
    expected = dense_attention(*(x.squeeze(1) for x in inputs), bounds)
    assert got.shape == (row, 1, HEADS * HEAD_DIM)
    torch.testing.assert_close(got.squeeze(1), expected, atol=1e-12, rtol=0)
    weights = torch.randn_like(expected)
    ours = torch.autograd.grad((got.squeeze(1) * weights).sum(), inputs)
    theirs = torch.autograd.grad((expected * weights).sum(), inputs)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-12, rtol=0)


def test_norm() -> None:
    config: Any = SimpleNamespace(params_dtype=torch.float64, sequence_parallel=True, use_cpu_initialization=True)
    norm = RMSNorm(config, hidden_size=6, eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(5, 6, dtype=torch.float64)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected, atol=1e-14, rtol=1e-14)
    assert norm.weight.sequence_parallel, "Megatron sums its gradient over tensor ranks by this mark"
