"""Point-to-point delivery by a plan that every rank knows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Message:
    """`tokens` rows of the payload of item `number` go from rank `source` to rank `target`."""

    number: int
    source: int
    target: int
    tokens: int


def exchange(
    plan: Sequence[Message],
    held: Mapping[int, tuple[Tensor, ...]],
    empty: tuple[Tensor, ...],
    device: torch.device,
) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Deliver payloads; yields (item, payload on the CPU) for every message whose target is this rank.

    Args:
        plan: the same on every rank. Only ranks that it names take part.
        held: payloads by item, on the ranks that are sources; [tokens, ...] tensors.
        empty: a payload of no tokens, for shapes and dtypes; the same on every rank.
        device: where messages travel from and to.

    One message per pair of ranks and tensor of the payload, all in flight together.
    """
    rank = dist.get_rank()
    operations: list[dist.P2POp] = []
    buffers: dict[int, list[Tensor]] = {}
    for target, messages in _by(plan, rank, outgoing=True).items():
        for tag, part in enumerate(zip(*(held[message.number] for message in messages), strict=True)):
            operations.append(dist.P2POp(dist.isend, torch.cat(part).to(device), target, tag=tag))
    for source, messages in _by(plan, rank, outgoing=False).items():
        tokens = sum(message.tokens for message in messages)
        buffers[source] = [torch.empty(tokens, *e.shape[1:], dtype=e.dtype, device=device) for e in empty]
        operations += [dist.P2POp(dist.irecv, b, source, tag=tag) for tag, b in enumerate(buffers[source])]
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
    for message in plan:
        if message.source == message.target == rank:
            yield message.number, tuple(part.cpu() for part in held[message.number])
    for source, messages in _by(plan, rank, outgoing=False).items():
        parts = [buffer.cpu().split([message.tokens for message in messages]) for buffer in buffers[source]]
        for message, payload in zip(messages, zip(*parts, strict=True), strict=True):
            yield message.number, payload


def _by(plan: Sequence[Message], rank: int, outgoing: bool) -> dict[int, list[Message]]:
    """This rank's messages to (or from) each other rank, in the order of the plan, other ranks ascending."""
    answer: dict[int, list[Message]] = {}
    for message in plan:
        mine, other = (message.source, message.target) if outgoing else (message.target, message.source)
        if mine == rank != other:
            answer.setdefault(other, []).append(message)
    return dict(sorted(answer.items()))
