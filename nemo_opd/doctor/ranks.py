"""Do all ranks compute the same, each time, and how fast are they together? Collective; knows tensors alone."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from nemo_opd.doctor.finding import Finding, Verdict
from nemo_opd.processes import Processes

SEED = 20_170_612
TRIES = 5
SLOW = 2.0
"""Times the median: a rank that takes longer is told of."""
MESSAGE = {"cuda": 64 << 20, "cpu": 4 << 20}
"""Bytes of the all-reduce."""
SIDE = {"cuda": 2048, "cpu": 256}
"""Of the square matrices."""
_HEADS, _LENGTH, _HEAD = 4, 128, 64


@dataclass(frozen=True)
class Computed:
    """Of one rank."""

    digest: str
    """SHA-256 of the bytes of the results."""
    repeated: bool
    """Were they the same when it was computed again?"""
    product: float
    """Best seconds of both results, and of the all-reduce."""
    reduced: float


def rank_findings(processes: Processes, dtype: torch.dtype, device: torch.device) -> list[Finding]:
    """The same seeded work on every rank, in `dtype`, and an all-reduce over the default group. Findings come back on
    the first process. `TRIES` + 1 all-reduces, as many barriers, and one gather of text."""
    digest, product, repeated = _computed(dtype, device)
    reduced = _reduced(processes, device)
    mine = Computed(digest, repeated, product, reduced)
    every = [Computed(**json.loads(text)) for text in processes.gather_text(json.dumps(asdict(mine)))]
    return judged(every, MESSAGE[device.type]) if processes.is_first else []


def judged(every: Sequence[Computed], size: int) -> list[Finding]:
    """Rows of what the ranks found.

    Args:
        every: by rank.
        size: bytes of the all-reduce.
    """
    rows = [_again(every)]
    if len(every) > 1:
        rows += [_equal(every), _bandwidth(every, size)]
        rows.append(_slowest("ranks: seconds of a product, slowest over median", [one.product for one in every]))
        rows.append(_slowest("ranks: seconds of an all-reduce, slowest over median", [one.reduced for one in every]))
    return rows


def _again(every: Sequence[Computed]) -> Finding:
    other = [rank for rank, one in enumerate(every) if not one.repeated]
    name, bound = "ranks: the same work twice", "the same bytes"
    if not other:
        return Finding(name, Verdict.OK, f"the same on {len(every)} rank(s)", bound)
    way_out = "a device that computes otherwise each time may be broken: test it, or leave its node out"
    return Finding(name, Verdict.FAIL, f"another result on {_listed(other)}", bound, way_out)


def _equal(every: Sequence[Computed]) -> Finding:
    digests = [one.digest for one in every]
    usual = max(digests, key=digests.count)
    other = [rank for rank, digest in enumerate(digests) if digest != usual]
    name, bound = "ranks: the same work on each", "the same bytes"
    if not other:
        return Finding(name, Verdict.OK, f"the same on {len(every)} ranks", bound)
    way_out = "compare their devices, drivers and libraries: a run cannot be repeated bit for bit, or one is broken"
    return Finding(name, Verdict.WARN, f"another result on {_listed(other)}", bound, way_out)


def _bandwidth(every: Sequence[Computed], size: int) -> Finding:
    """Bytes that each rank sends in a ring, 2 (n - 1) / n of the message, over the slowest rank's seconds."""
    slowest = max(one.reduced for one in every)
    moved = 2 * (len(every) - 1) / len(every) * size
    return Finding(f"ranks: all-reduce of {size >> 20} MiB, GB/s", Verdict.OK, moved / slowest / 1e9)


def _slowest(name: str, seconds: Sequence[float]) -> Finding:
    usual = statistics.median_low(seconds)  # of two ranks the faster one's
    slow = [rank for rank, one in enumerate(seconds) if one > SLOW * usual]
    way_out = f"{_listed(slow)} hold all others up: look at clocks, other processes, and the network" if slow else ""
    verdict = Verdict.WARN if slow else Verdict.OK
    return Finding(name, verdict, max(seconds) / usual, f"at most {SLOW:g}", way_out)


def _listed(ranks: Sequence[int]) -> str:
    """``rank 3, 5``"""
    return f"rank {', '.join(map(str, ranks))}"


def _computed(dtype: torch.dtype, device: torch.device) -> tuple[str, float, bool]:
    """(digest, best seconds, was every repetition the same?)"""
    side = SIDE[device.type]
    drawn = torch.Generator().manual_seed(SEED)
    left, right = (torch.randn(side, side, generator=drawn).to(device, dtype) for _ in range(2))
    shape = (1, _HEADS, _LENGTH, _HEAD)
    q, k, v = (torch.randn(shape, generator=drawn).to(device, dtype) for _ in range(3))
    digests, seconds = [], []
    for _ in range(TRIES):
        _wait(device)
        begin = time.perf_counter()
        product = left @ right
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        _wait(device)
        seconds.append(time.perf_counter() - begin)
        digests.append(_digest(product, attended))
    return digests[0], min(seconds), len(set(digests)) == 1


def _reduced(processes: Processes, device: torch.device) -> float:
    """Best seconds of an all-reduce of float32, after one that connects the ranks; 0 on one rank."""
    if processes.size == 1:
        return 0.0
    message = torch.ones(MESSAGE[device.type] // 4, device=device)
    dist.all_reduce(message)
    seconds = []
    for _ in range(TRIES):
        _wait(device)
        processes.barrier()
        begin = time.perf_counter()
        dist.all_reduce(message, op=dist.ReduceOp.MAX)
        _wait(device)
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def _digest(*results: Tensor) -> str:
    digest = hashlib.sha256()
    for one in results:
        digest.update(one.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
