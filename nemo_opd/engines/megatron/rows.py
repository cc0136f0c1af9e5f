"""Rows of packed sequences as Megatron wants them.

Several sequences lie end to end in one row; attention must not cross their bounds and positions restart at each. With
Transformer Engine that is Megatron's `PackedSeqParams` in the "thd" format. The local attention of this package (see
`nemo_opd.engines.megatron.local`) takes `Runs` instead: parts of the row that are dense batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

Runs = tuple[tuple[int, int], ...]
"""The sequences of a row in order, as (sequences, length) of each run of neighbours that are equally long: a run is a
dense batch as it lies there. Rows are planned longest sequence first, which makes runs as long as they can be."""


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
    runs: Runs | None
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
        runs=None if transformer_engine else runs_of(lengths),
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


def runs_of(lengths: Tensor) -> Runs:
    """Of the lengths of the row's sequences, int64 [sequences]."""
    found, counts = lengths.unique_consecutive(return_counts=True)
    return tuple(zip(counts.tolist(), found.tolist(), strict=True))
