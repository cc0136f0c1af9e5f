"""Packed rows: positions restart, and the dense batches hold every position once."""

from __future__ import annotations

import itertools

import pytest
import torch

from nemo_opd.engines.megatron.rows import model_inputs, slots_of

CPU = torch.device("cpu")
LENGTHS = [(5,), (3, 1, 9, 4, 4), (1, 1, 1), (64, 2, 33, 32, 31, 1)]


def bounds_of(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(list(itertools.accumulate(lengths, initial=0)))


@pytest.mark.parametrize("lengths", LENGTHS)
def test_slots_hold_every_position_once(lengths: tuple[int, ...]) -> None:
    bounds = bounds_of(lengths)
    slots = slots_of(bounds, CPU)
    real = slots.real.flatten()
    assert torch.equal(slots.source[slots.slot], torch.arange(int(bounds[-1])))
    assert torch.equal(slots.source[real].sort().values, torch.arange(int(bounds[-1])))
    assert sum(sequences for sequences, _ in slots.shapes) == len(lengths)
    assert len(slots.source) == sum(sequences * longest for sequences, longest in slots.shapes)
    assert int((~real).sum()) < int(real.sum()), "less than half of the slots are padding"


@pytest.mark.parametrize("lengths", LENGTHS)
def test_a_slot_sequence_is_a_row_sequence_in_order(lengths: tuple[int, ...]) -> None:
    bounds = bounds_of(lengths)
    slots = slots_of(bounds, CPU)
    found, first = [], 0
    for sequences, longest in slots.shapes:
        for _ in range(sequences):
            part = slice(first, first + longest)
            found.append(tuple(slots.source[part][slots.real.flatten()[part]].tolist()))
            first += longest
    expected = [tuple(range(int(a), int(z))) for a, z in itertools.pairwise(bounds)]
    assert sorted(found) == sorted(expected)


def test_positions_restart_and_padding_is_a_sequence_of_its_own() -> None:
    inputs = model_inputs(torch.arange(10, 18), torch.tensor([0, 5, 8], dtype=torch.int32), 4, False, CPU)
    assert inputs.input_ids.tolist() == [[10, 11, 12, 13, 14, 15, 16, 17]]
    padded = model_inputs(torch.arange(10, 17), torch.tensor([0, 5, 7], dtype=torch.int32), 4, False, CPU)
    assert padded.input_ids.tolist() == [[10, 11, 12, 13, 14, 15, 16, 0]]
    assert padded.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 0]]
    assert padded.longest == 5 and padded.packed is None


def test_transformer_engine_gets_the_bounds() -> None:
    inputs = model_inputs(torch.arange(7), torch.tensor([0, 5, 7], dtype=torch.int32), 4, True, CPU)
    assert inputs.slots is None and inputs.packed is not None
    assert inputs.packed.qkv_format == "thd"
    assert inputs.packed.cu_seqlens_q.tolist() == [0, 5, 7, 8] and inputs.packed.cu_seqlens_q.dtype == torch.int32
    assert inputs.packed.max_seqlen_q == 5


def test_an_empty_replica_has_one_position() -> None:
    inputs = model_inputs(torch.zeros(1, dtype=torch.int64), torch.tensor([0, 1], dtype=torch.int32), 2, False, CPU)
    assert inputs.position_ids.tolist() == [[0, 0]]
