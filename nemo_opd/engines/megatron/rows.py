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

from nemo_opd.engines.megatron.context import Context, Share

Runs = tuple[tuple[int, int], ...]
"""The sequences of a row in order, as (sequences, length) of each run of neighbours that are equally long: a run is a
dense batch as it lies there. Rows are planned longest sequence first, which makes runs as long as they can be."""


@dataclass(frozen=True)
class ModelInputs:
    """One row on the model's device; under context parallelism what this rank holds of it."""

    input_ids: Tensor
    """int64 [1, held]"""
    position_ids: Tensor
    """int64 [1, held], places in the sequences: from 0 in each"""
    longest: int
    """Length of the longest sequence, whichever ranks hold it."""
    packed: PackedSeqParams | None
    """For Transformer Engine attention."""
    runs: Runs | None
    """For the local attention: of what is held here."""
    share: Share
    """Which of the row's positions are held here: all of them, except under context parallelism."""


def model_inputs(
    input_ids: Tensor,
    cu_seqlens: Tensor,
    multiple: int,
    transformer_engine: bool,
    device: torch.device,
    context: Context = Context(),  # noqa: B008 - frozen
) -> ModelInputs:
    """Lay out one row, or a context-parallel rank's part of it.

    Args:
        input_ids: int64 [row] on the CPU; positions from ``cu_seqlens[-1]`` on are padding.
        cu_seqlens: int32 [sequences + 1] on the CPU, bounds of the sequences.
        multiple: what is held here is padded to a multiple of this (sequence parallelism cuts it into equal parts).
        transformer_engine: which of the two attention descriptions to make.
        device: where the model is.
        context: this process among those that share the row's sequences.
    """
    share = context.share(cu_seqlens, len(input_ids), multiple)
    held = torch.zeros(len(share.source), dtype=torch.int64)
    real = share.source >= 0
    held[real] = input_ids[share.source[real]]
    longest = int(share.lengths.max())
    return ModelInputs(
        input_ids=held[None].to(device, non_blocking=True),
        position_ids=share.positions[None].to(device, non_blocking=True),
        longest=longest,
        packed=_packed(share.lengths, longest, device, context.ranks > 1) if transformer_engine else None,
        runs=None if transformer_engine else runs_of(share.lengths // context.ranks),
        share=share,
    )


def _packed(lengths: Tensor, longest: int, device: torch.device, cut: bool) -> PackedSeqParams:
    """Bounds of whole sequences also where they are `cut` over ranks, each with its padding as a part of it."""
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    cu_seqlens = bounds.to(device=device, dtype=torch.int32, non_blocking=True)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=cu_seqlens if cut else None,
        cu_seqlens_kv_padded=cu_seqlens if cut else None,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def runs_of(lengths: Tensor) -> Runs:
    """Of the lengths of the row's sequences, int64 [sequences]."""
    found, counts = lengths.unique_consecutive(return_counts=True)
    return tuple(zip(counts.tolist(), found.tolist(), strict=True))
