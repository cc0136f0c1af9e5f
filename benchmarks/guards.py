"""What the guards cost per step: the share of a step that each part of docs/guards.md takes.

    python -m benchmarks.guards RUN [--out FILE]      RUN: a run folder, for the seconds of a step

Every part is called as the loop calls it and set against the mean step of RUN: where ranks talk to each other, by two
processes over gloo, the least wall time of many calls; otherwise the least CPU time. Other work on the machine can only
add to both. Threads and processes beside the step are given as CPU seconds per second, their share of one core.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.step import machine
from nemo_opd.config import GuardConfig, LimitsConfig, StragglerConfig
from nemo_opd.processes import Processes
from nemo_opd.reliability.guard import Guard
from nemo_opd.reliability.heartbeat import Heartbeat
from nemo_opd.reliability.straggler import Own, Stragglers
from nemo_opd.reliability.watchdog import watching

RANKS = 2
SKIP = 5
"""Steps at the start of a run that are left out."""
SECTIONS = 16
"""Entered in one step, a save and an evaluation included."""
BESIDE_SECONDS = 10.0
GRADIENT = 1 << 26
"""Numbers in the gradient whose sum is timed."""


def cpu_seconds_of(call: Callable[[], object], repeats: int) -> float:
    """Least CPU seconds of a call on this thread: other work on the machine can only add."""
    times = []
    for _ in range(repeats):
        begin = time.thread_time()
        call()
        times.append(time.thread_time() - begin)
    return min(times)


def seconds_of(call: Callable[[], object], repeats: int) -> float:
    """Least wall seconds of a call."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


def rank_parts(rank: int, folder: str, repeats: int) -> None:
    """One rank's calls; rank 0 leaves its seconds in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    processes = Processes.current()
    guard = Guard(GuardConfig(), {}, processes)
    for step in range(200):
        guard.accepts(1.0 + step % 7 / 10, 1.0 + step % 5 / 10)
    stragglers = Stragglers(StragglerConfig(), processes)
    own = {"rollout": Own(1.0), "train": Own(1.0, 1000.0)}
    steps = iter(range(10**9))
    parts = {
        "decision on the update, with a full window": seconds_of(lambda: guard.accepts(1.0, 1.0), repeats),
        "stragglers": seconds_of(lambda: stragglers.look(next(steps), own), repeats),
    }
    if rank == 0:
        Path(folder, "parts.json").write_text(json.dumps(parts))
    dist.destroy_process_group()


def section_seconds(folder: Path, repeats: int) -> float:
    heartbeat = Heartbeat(folder, 0, "a/0").begin()

    def step() -> None:
        for _ in range(SECTIONS):
            with heartbeat.section("train"):
                pass

    seconds = cpu_seconds_of(step, repeats)
    heartbeat.end()
    return seconds


def gradient_sum_seconds(repeats: int) -> float:
    """Per number of the gradient, one thread."""
    gradient = torch.zeros(GRADIENT)
    return cpu_seconds_of(lambda: gradient.sum(), repeats) / GRADIENT


def beside(folder: Path) -> tuple[float, float]:
    """CPU seconds per second of the beating thread and of the watchdog."""
    heartbeat = Heartbeat(folder, 0, "a/0").begin()
    with watching(folder, "a", "a/0", dict.fromkeys(LimitsConfig.__annotations__, 600.0)) as watchdog:
        time.sleep(2.0)  # it has started
        begin, ours, its = time.monotonic(), time.process_time(), _cpu_seconds(watchdog)
        time.sleep(BESIDE_SECONDS)
        wall = time.monotonic() - begin
        found = (time.process_time() - ours) / wall, (_cpu_seconds(watchdog) - its) / wall
    heartbeat.end()
    return found


def _cpu_seconds(pid: int) -> float:
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def step_of(run: Path) -> tuple[float, int]:
    """(mean seconds of a step, trainable numbers of the student)"""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line["time/total"] for line in lines if "evaluation" not in line][SKIP:]
    size = sum(path.stat().st_size for path in (run / "model").glob("*.safetensors")) // 4
    return statistics.fmean(steps), size


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="a finished float32 run")
    parser.add_argument("--repeats", type=int, default=500)
    parser.add_argument("--out", type=Path, help="write the table there too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        mp.spawn(rank_parts, (scratch, args.repeats), nprocs=RANKS)
        parts = json.loads(Path(scratch, "parts.json").read_text())
        parts[f"heartbeat: {SECTIONS} sections entered and left"] = section_seconds(Path(scratch), args.repeats)
        beat, watchdog = beside(Path(scratch, "beside"))
    total, size = step_of(args.run)
    per_number = gradient_sum_seconds(15)
    parts[f"sum of a rank's own gradient, {size:,} numbers"] = per_number * size
    rows = ["| part | seconds per step | share of the step |", "|---|---|---|"]
    rows += [f"| {name} | {seconds:.6f} | {seconds / total:.3%} |" for name, seconds in parts.items()]
    rows += [f"| beating thread, of one core | | {beat:.3%} |", f"| watchdog, of one core | | {watchdog:.3%} |"]
    rows += [
        f"| **all** | | **{sum(parts.values()) / total + beat + watchdog:.2%}** |",
        "",
        f"Steps of {args.run.name} take {total:.3f} s (mean). The gradient's sum reads {4 / per_number / 1e9:.1f} "
        f"GB/s: one pass over memory that forward, backward and update go through many times. {machine()}.",
    ]
    print("\n".join(rows))
    if args.out:
        command = f"python -m benchmarks.guards {args.run}"
        args.out.write_text(f"# What the guards cost\n\n`{command}`\n\n" + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
