"""Packed rows: positions restart, and neighbours that are equally long are one dense batch."""

from __future__ import annotations

import pytest
import torch

from nemo_opd.engines.megatron.rows import model_inputs, runs_of

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("lengths", "runs"),
    [
        ((5,), ((1, 5),)),
        ((4, 4, 4), ((3, 4),)),
        ((9, 4, 4, 3, 1, 1), ((1, 9), (2, 4), (1, 3), (2, 1))),
        ((4, 9, 4), ((1, 4), (1, 9), (1, 4))),
    ],
)
def test_neighbours_of_one_length_are_a_batch(lengths: tuple[int, ...], runs: tuple[tuple[int, int], ...]) -> None:
    assert runs_of(torch.tensor(lengths)) == runs


def test_positions_restart_and_padding_is_a_sequence_of_its_own() -> None:
    inputs = model_inputs(torch.arange(10, 18), torch.tensor([0, 5, 8], dtype=torch.int32), 4, False, CPU)
    assert inputs.input_ids.tolist() == [[10, 11, 12, 13, 14, 15, 16, 17]]
    padded = model_inputs(torch.arange(10, 17), torch.tensor([0, 5, 7], dtype=torch.int32), 4, False, CPU)
    assert padded.input_ids.tolist() == [[10, 11, 12, 13, 14, 15, 16, 0]]
    assert padded.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 0]]
    assert padded.longest == 5 and padded.packed is None
    assert padded.runs == ((1, 5), (1, 2), (1, 1))


def test_transformer_engine_gets_the_bounds() -> None:
    inputs = model_inputs(torch.arange(7), torch.tensor([0, 5, 7], dtype=torch.int32), 4, True, CPU)
    assert inputs.runs is None and inputs.packed is not None
    assert inputs.packed.qkv_format == "thd"
    assert inputs.packed.cu_seqlens_q.tolist() == [0, 5, 7, 8] and inputs.packed.cu_seqlens_q.dtype == torch.int32
    assert inputs.packed.max_seqlen_q == 5


def test_an_empty_replica_has_one_position() -> None:
    inputs = model_inputs(torch.zeros(1, dtype=torch.int64), torch.tensor([0, 1], dtype=torch.int32), 2, False, CPU)
    assert inputs.position_ids.tolist() == [[0, 0]]
