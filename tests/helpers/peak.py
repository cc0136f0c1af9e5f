"""The peak of what torch allocates on the CPU while something runs, and what is live then.

Counted is every block of torch's CPU allocator, workspaces inside of kernels included, by torch's own profiler. Blocks
that were there before are no part of it. What a thread of gloo gives back is not seen until the block is used again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Peak:
    """Bytes that were live at the same time, at most."""

    bytes: int
    live: tuple[tuple[int, str], ...]
    """The blocks of that moment, the largest first, each with the operations that it was allocated in."""
    kept: int
    """Bytes that are still there at the end."""


def peak_of(run: Callable[[], Any], stacks: bool = False) -> Peak:
    """Run once under the profiler. `stacks`: say the Python functions too, which takes far longer."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, with_stack=stacks) as found:
        run()
    blocks = sorted(_blocks(found), key=lambda block: block[0])
    highest, at = 0, 0
    total = 0
    live: dict[int, tuple[int, str]] = {}
    for number, (_, address, size, where) in enumerate(blocks):
        if size < 0 and address not in live:
            continue  # was there before
        total += size
        if size > 0:
            total -= live.get(address, (0, ""))[0]  # given back by a thread that is not watched (gloo's)
            live[address] = (size, where)
        else:
            del live[address]
        if total > highest:
            highest, at = total, number
    at_peak: dict[int, tuple[int, str]] = {}
    for _, address, size, where in blocks[: at + 1]:
        at_peak.pop(address, None)
        if size > 0:
            at_peak[address] = (size, where)
    return Peak(highest, tuple(sorted(at_peak.values(), reverse=True)), total)


def _blocks(found: profile) -> Iterator[tuple[int, int, int, str]]:
    """(time, address, bytes, where) of each allocation, and with negative bytes of each release."""
    results: Any = found.profiler.kineto_results  # type: ignore[union-attr]
    waiting: list[tuple[Any, str]] = [(event, "") for event in results.experimental_event_tree()]
    while waiting:
        event, where = waiting.pop()
        if event.tag == torch._C._profiler._EventType.Allocation:
            fields = event.extra_fields
            if fields.device.type == "cpu":
                yield event.start_time_ns, fields.ptr, fields.alloc_size, where
        inner = f"{where} > {event.name}" if where else event.name
        waiting += [(child, inner) for child in event.children]
