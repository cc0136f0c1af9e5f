"""Rows of packed sequences as Megatron wants them.

Several sequences lie end to end in one row; attention must not cross their bounds and positions restart at each. With
Transformer Engine that is Megatron's `PackedSeqParams` in the "thd" format. The local attention of this package (see
`nemo_opd.engines.megatron.local`) takes `Slots` instead: where each position of the row goes in a few dense batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass(frozen=True)
class Slots:
    """The sequences of a row as dense batches ``[sequences, longest]``, without a mask of size row x row.

    Sequences are batched by length, the longest of a batch less than twice its shortest, so at most half of the slots
    are padding. Padding stands at the end of a sequence, where causal attention keeps it from every real position.
    """

    shapes: tuple[tuple[int, int], ...]
    """(sequences, longest) of each batch"""
    source: Tensor
    """int64 [slots], the row position in each slot, batch after batch; padding repeats the sequence's last position"""
    real: Tensor
    """bool [slots, 1, 1], False for padding"""
    slot: Tensor
    """int64 [row], the slot of each row position"""


@dataclass(frozen=True)
class ModelInputs:
    """One row on the model's device."""

    input_ids: Tensor
    """int64 [1, row]"""
    position_ids: Tensor
    """int64 [1, row], restarting at 0 for every sequence"""
    longest: int
    """Length of the longest sequence."""
    packed: PackedSeqParams | None
    """For Transformer Engine attention."""
    slots: Slots | None
    """For the local attention."""


def model_inputs(
    input_ids: Tensor, cu_seqlens: Tensor, multiple: int, transformer_engine: bool, device: torch.device
) -> ModelInputs:
    """Lay out one row.

    Args:
        input_ids: int64 [row] on the CPU; positions from ``cu_seqlens[-1]`` on are padding.
        cu_seqlens: int32 [sequences + 1] on the CPU, bounds of the sequences.
        multiple: the row is padded to a multiple of this (sequence parallelism cuts it into equal parts).
        transformer_engine: which of the two attention descriptions to make.
        device: where the model is.
    """
    used = int(cu_seqlens[-1])
    size = -(-max(len(input_ids), 1) // multiple) * multiple
    padded = torch.zeros(size, dtype=torch.int64)
    padded[:used] = input_ids[:used]
    bounds = cu_seqlens.to(torch.int64)
    if size > used:  # padding is one more sequence: it sees itself only
        bounds = torch.cat([bounds, torch.tensor([size])])
    lengths = bounds.diff()
    positions = torch.arange(size) - torch.repeat_interleave(bounds[:-1], lengths)
    longest = int(lengths.max())
    return ModelInputs(
        input_ids=padded[None].to(device, non_blocking=True),
        position_ids=positions[None].to(device, non_blocking=True),
        longest=longest,
        packed=_packed(bounds, longest, device) if transformer_engine else None,
        slots=None if transformer_engine else slots_of(bounds, device),
    )


def _packed(bounds: Tensor, longest: int, device: torch.device) -> PackedSeqParams:
    cu_seqlens = bounds.to(device=device, dtype=torch.int32, non_blocking=True)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def slots_of(bounds: Tensor, device: torch.device) -> Slots:
    """Batch the sequences between `bounds` (int64 [sequences + 1], covering the whole row, none empty)."""
    starts, lengths = bounds[:-1], bounds.diff()
    order = lengths.argsort(descending=True, stable=True)
    sorted_lengths = lengths[order].tolist()
    shapes, sources, reals = [], [], []
    first = 0
    while first < len(sorted_lengths):
        longest = sorted_lengths[first]
        last = first
        while last < len(sorted_lengths) and 2 * sorted_lengths[last] > longest:
            last += 1
        members = order[first:last, None]
        offset = torch.arange(longest)
        sources.append((starts[members] + torch.minimum(offset, lengths[members] - 1)).flatten())
        reals.append((offset < lengths[members]).flatten())
        shapes.append((last - first, longest))
        first = last
    source, real = torch.cat(sources), torch.cat(reals)
    slot = torch.empty(int(bounds[-1]), dtype=torch.int64)
    slot[source[real]] = real.nonzero().squeeze(-1)
    return Slots(tuple(shapes), source.to(device), real[:, None, None].to(device), slot.to(device))
