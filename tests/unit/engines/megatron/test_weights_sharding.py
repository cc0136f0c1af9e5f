"""Every element of a Hugging Face tensor lands on the ranks exactly once, at the place where Megatron wants it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nemo_opd.engines.megatron.families import Architecture, architecture_of, padded_vocab_size
from nemo_opd.engines.megatron.sharding import local_shape, pieces_of
from nemo_opd.engines.megatron.tables import Shard, Weight
from tests.unit.engines.megatron.test_weights_families import LLAMA32_1B, QWEN3_0_6B, QWEN25_7B


def _small(published: dict[str, object], heads: int, groups: int) -> Architecture:
    architecture = architecture_of(published)
    return replace(
        architecture,
        num_layers=2,
        hidden_size=24,
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=8,
        ffn_hidden_size=40,
        vocab_size=37,
    )


@pytest.mark.parametrize("published", [QWEN3_0_6B, QWEN25_7B, LLAMA32_1B], ids=["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize(("heads", "groups", "tp"), [(8, 8, 2), (8, 2, 1), (8, 4, 4), (8, 2, 4), (8, 1, 8)])
def test_pieces_cover_parameters_and_tensors_exactly_once(
    published: dict[str, object], heads: int, groups: int, tp: int
) -> None:
    architecture = _small(published, heads, groups)
    architecture.check_layout(tp, 1)
    padded = padded_vocab_size(architecture.vocab_size, 4, tp)
    for weight in architecture.weights():
        seen = [torch.zeros(architecture.shape(tensor), dtype=torch.int64) for tensor in weight.hf]
        for rank in range(tp):
            held = torch.zeros(local_shape(weight, architecture, padded, tp), dtype=torch.int64)
            for piece in pieces_of(weight, architecture, padded, rank, tp):
                held.narrow(piece.dim, piece.offset, piece.length).add_(1)
                seen[piece.tensor].narrow(piece.dim, piece.start, piece.length).add_(1)
            padding = max(0, (rank + 1) * held.shape[0] - architecture.vocab_size)
            if weight.shard is Shard.VOCAB and padding:
                assert not held[-min(padding, len(held)) :].any(), "padding rows come from nowhere"
                held = held[: max(0, len(held) - padding)]
            assert (held == 1).all(), f"{weight.megatron} on rank {rank}"
        times = tp if weight.shard is Shard.REPLICATED else 1
        assert all((count == times).all() for count in seen), weight.megatron


def _fused(architecture: Architecture, name: str, tp: int) -> tuple[Weight, list[list[int]]]:
    """For each rank, which (1000 * tensor + row) each row of the parameter is."""
    weight = next(w for w in architecture.weights() if w.megatron.endswith(name))
    ranks = []
    for rank in range(tp):
        rows = [-1] * local_shape(weight, architecture, 40, tp)[0]
        for piece in pieces_of(weight, architecture, 40, rank, tp):
            for i in range(piece.length):
                rows[piece.offset + i] = 1000 * piece.tensor + piece.start + i
        ranks.append(rows)
    return weight, ranks


def test_query_key_and_value_are_interleaved_by_group() -> None:
    architecture = replace(_small(QWEN25_7B, 4, 2), head_dim=1)  # rows are heads
    expected = [[0, 1, 1000, 2000], [2, 3, 1001, 2001]]
    assert _fused(architecture, "linear_qkv.weight", 2)[1] == expected
    assert _fused(architecture, "linear_qkv.bias", 2)[1] == expected
    assert _fused(architecture, "linear_qkv.weight", 1)[1] == [expected[0] + expected[1]]


def test_gate_and_up_lie_side_by_side_on_each_rank() -> None:
    architecture = replace(_small(LLAMA32_1B, 4, 2), ffn_hidden_size=4)
    assert _fused(architecture, "linear_fc1.weight", 2)[1] == [[0, 1, 1000, 1001], [2, 3, 1002, 1003]]
