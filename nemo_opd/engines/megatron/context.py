"""Sequences cut over context-parallel ranks: who holds which positions, and how answers about them are put together.

With C ranks every sequence of a row is padded to a multiple of 2 C positions and cut into 2 C chunks of equal length.
Rank r holds chunks r and 2 C - 1 - r, so that each has the same share of a causal attention's work. It is the order of
Megatron and of Transformer Engine's packed rows (its `thd_get_partitioned_indices`). Padding lies at the end of its
sequence, where no other position sees it.

All ranks of a replica know the whole row: what a position predicts is found before sequences are cut, not after.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_opd.types import TokenBatch


@dataclass(frozen=True)
class Share:
    """The part of one row that a rank holds; tensors on the CPU."""

    lengths: Tensor
    """int64 [sequences], of the whole sequences with their padding; padding behind the last is a sequence too"""
    positions: Tensor
    """int64 [held], the place of each held position in its sequence"""
    source: Tensor
    """int64 [held], the place of each held position in the row as it was packed, -1 for padding"""
    place: Tensor
    """int64 [row as it was packed], the number of each position among those held, -1 where another rank holds it"""

    def numbers(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """(which of these positions of the packed row are held here, int64 [any]; their numbers among those held)."""
        place = self.place[position.cpu()]
        held = (place >= 0).nonzero().squeeze(1)
        return held, place[held]

    def tokens(self, tokens: TokenBatch) -> tuple[TokenBatch, Tensor]:
        """(the tokens that are predicted here, with `position` among those held; which of the row's they are)."""
        held, numbers = self.numbers(tokens.position)
        if len(held) == len(tokens) and torch.equal(numbers, tokens.position):
            return tokens, held
        return replace(tokens.select(held), position=numbers), held


@dataclass(frozen=True)
class Context:
    """One of the `ranks` over which sequences are cut; by default they are not."""

    ranks: int = 1
    rank: int = 0

    def share(self, cu_seqlens: Tensor, row: int, multiple: int) -> Share:
        """What this rank holds of a row.

        Args:
            cu_seqlens: int32 [sequences + 1] on the CPU, bounds of the sequences.
            row: positions of the row as it was packed; those from ``cu_seqlens[-1]`` on are padding.
            multiple: what each rank holds is a multiple of this long.
        """
        bounds = cu_seqlens.to(torch.int64)
        unit = 2 * self.ranks if self.ranks > 1 else 1
        lengths = -(-bounds.diff() // unit) * unit
        used, whole = int(lengths.sum()), math.lcm(unit, self.ranks * multiple)
        size = -(-max(used + row - int(bounds[-1]), 1) // whole) * whole
        if size > used:  # padding behind the last sequence is one more: it sees itself only
            lengths = torch.cat([lengths, torch.tensor([size - used])])
        begins = lengths.cumsum(0) - lengths
        held = held_positions(lengths, self.ranks, self.rank)
        source = _origin(bounds, begins, size)[held]
        place = torch.full((max(row, 1),), -1)
        real = (source >= 0).nonzero().squeeze(1)
        place[source[real]] = real
        positions = torch.arange(size) - torch.repeat_interleave(begins, lengths)
        return Share(lengths, positions[held], source, place)


def _origin(bounds: Tensor, begins: Tensor, size: int) -> Tensor:
    """int64 [size]: where each position of the padded row is in the row as it was packed, -1 for padding."""
    moved = torch.repeat_interleave(begins[: len(bounds) - 1] - bounds[:-1], bounds.diff())
    packed = torch.arange(len(moved))
    origin = torch.full((size,), -1)
    origin[packed + moved] = packed
    return origin


def held_positions(lengths: Tensor, ranks: int, rank: int) -> Tensor:
    """Positions of a row that `rank` holds, in its order: of each sequence chunk `rank` and chunk 2 ranks - 1 - rank.

    Args:
        lengths: int64 [sequences], of the row's sequences, multiples of 2 ranks (of 1 where there is one rank).

    Returns:
        int64 [row / ranks]
    """
    if ranks == 1:
        return torch.arange(int(lengths.sum()))
    assert bool((lengths % (2 * ranks) == 0).all())
    chunk = lengths // (2 * ranks)
    begins, held_before = lengths.cumsum(0) - lengths, 2 * (chunk.cumsum(0) - chunk)
    begin, before, size = (torch.repeat_interleave(x, 2 * chunk) for x in (begins, held_before, chunk))
    inside = torch.arange(len(size)) - before
    number = torch.where(inside < size, rank, 2 * ranks - 1 - rank)
    return begin + number * size + inside % size


def whole_sequences(parts: Tensor, sequences: int) -> Tensor:
    """[ranks, sequences x 2 chunk, ...], what each rank holds of sequences of one length ->
    [sequences, 2 ranks x chunk, ...], the sequences."""
    chunks = parts.unflatten(1, (sequences, 2, -1))
    return torch.cat([chunks[:, :, 0], chunks[:, :, 1].flip(0)]).transpose(0, 1).flatten(1, 2)


def put_together(values: Tensor, held: Tensor, total: int, group: dist.ProcessGroup) -> Tensor:
    """[total, ...] from every rank's `values` [held, ...] at its places `held`. One all-reduce, which adds zeros to
    each number."""
    whole = values.new_zeros(total, *values.shape[1:])
    whole[held.to(values.device)] = values
    dist.all_reduce(whole, group=group)
    return whole
