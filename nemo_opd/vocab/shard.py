"""Which rows of an output layer a rank holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_opd.vocab import collectives


@dataclass(frozen=True)
class VocabShard:
    """The rows of an output layer that this rank holds.

    Example: a vocabulary of 10 ids padded to 12 over two ranks gives ``VocabShard(10, 0, 6, group)`` on the first
    (6 valid rows) and ``VocabShard(10, 6, 6, group)`` on the second (4 valid rows, 2 of padding).
    """

    vocab_size: int
    """Valid ids are 0..vocab_size-1 over all ranks; anything beyond is padding, with probability exactly 0."""
    start: int
    """Global id of the first local row."""
    length: int
    """Local rows, padding included."""
    group: dist.ProcessGroup | None = None
    """The ranks that hold the other rows; None: the whole vocabulary is here."""

    @property
    def valid(self) -> int:
        """Number of local rows that are real ids."""
        return min(max(self.vocab_size - self.start, 0), self.length)

    @property
    def size(self) -> int:
        """Number of ranks over which the vocabulary is spread."""
        return collectives.size(self.group)

    def same_columns(self, other: VocabShard) -> bool:
        """Do both hold the same valid ids on this rank? (Their padding may differ.)"""
        return (self.vocab_size, self.valid) == (other.vocab_size, other.valid) and (
            self.valid == 0 or self.start == other.start
        )

    def local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Column of each global id (0 where another rank holds it), and whether it is here; shapes of `ids`."""
        column = ids - self.start
        here = (column >= 0) & (column < self.valid)
        return torch.where(here, column, torch.zeros_like(column)), here


def dense_shard(vocab_size: int, padded_size: int | None = None) -> VocabShard:
    """The shard of a rank that holds everything."""
    return VocabShard(vocab_size, 0, padded_size or vocab_size, None)


def reshard_rows(weight: Tensor, shard: VocabShard, like: VocabShard) -> Tensor:
    """The rows of an output layer laid out as `like` lays out its own: [like.length, hidden]; padding rows are 0.

    For a teacher whose padded vocabulary differs from the student's, once, when it is loaded. Collective over the
    group of `shard` (which must have the ranks of `like.group`): one all-gather of the whole matrix.

    Raises:
        ValueError: the two models have different valid ids, or layouts of different size.
    """
    if shard.vocab_size != like.vocab_size or shard.size != like.size:
        raise ValueError(
            f"cannot lay out a vocabulary of {shard.vocab_size} ids over {shard.size} ranks like one of "
            f"{like.vocab_size} ids over {like.size} ranks; student and teacher must agree on both"
        )
    lengths = collectives.gather(torch.tensor([shard.length], device=weight.device), shard.group)
    if lengths.unique().numel() != 1:
        raise ValueError(f"output layer has shards of {lengths.flatten().tolist()} rows; expected equal shards")
    whole = collectives.gather(weight.detach(), shard.group).flatten(0, 1)
    mine = weight.new_zeros(like.length, weight.shape[1])
    mine[: like.valid] = whole[like.start : like.start + like.valid]
    return mine
