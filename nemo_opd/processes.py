"""The processes of a run as the loop sees them: a rank, a size, and a few small CPU collectives.

These carry token ids, counters and decisions, never weights or hidden states. They use the default process group's
CPU backend (gloo), also when the models talk over NCCL. One process needs no group at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Processes:
        """Read from the default process group; one process where there is none."""
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """True on every rank when it is true on one: how a decision is taken together. One all-reduce."""
        answer = torch.tensor([int(flag)])
        if self.size > 1:
            dist.all_reduce(answer, op=dist.ReduceOp.MAX)
        return bool(answer.item())

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sum each named value over the ranks (same names everywhere), in float64. One all-reduce."""
        totals = torch.tensor(list(values.values()), dtype=torch.float64)
        if self.size > 1 and len(values):
            dist.all_reduce(totals)
        return dict(zip(values, totals.tolist(), strict=True))

    def largest(self, values: Sequence[float]) -> list[float]:
        """The largest of each value over the ranks, in float64; finite values only. One all-reduce."""
        largest = torch.tensor(values, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest.tolist()

    def gather(self, values: Tensor) -> list[Tensor]:
        """Every rank's one-dimensional tensor, of any length, by rank. One all-gather of sizes, one of values."""
        if self.size == 1:
            return [values]
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([values.numel()]))
        longest = max(int(size) for size in sizes)
        padded = values.new_zeros(longest)
        padded[: values.numel()] = values
        parts = [values.new_zeros(longest) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return [part[: int(size)] for part, size in zip(parts, sizes, strict=True)]

    def share(self, count: int) -> range:
        """This rank's contiguous part of `count` items: parts differ by at most one and cover all."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def gather_text(self, text: str) -> list[str]:
        """Every rank's text, by rank."""
        parts = self.gather(torch.tensor(list(text.encode()), dtype=torch.uint8))
        return [bytes(part.tolist()).decode() for part in parts]

    def broadcast_text(self, text: str) -> str:
        """Rank 0's text on every rank."""
        return self.gather_text(text)[0]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def balanced(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Split items over `parts` so that the sums of lengths are close: longest first, each to the lightest part.

    Deterministic, so every rank computes the same split. Items of a part are in ascending order.
    """
    loads = [0] * parts
    members: list[list[int]] = [[] for _ in range(parts)]
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        lightest = min(range(parts), key=lambda part: (loads[part], part))
        members[lightest].append(item)
        loads[lightest] += lengths[item]
    return [sorted(part) for part in members]
