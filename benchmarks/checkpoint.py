"""What checkpoints cost: how long training stands still for one, in the foreground and in the background, and resuming.

    python benchmarks/checkpoint.py [--out benchmarks/results/checkpoint.md]

Two processes at TP 2 on this machine, float32, random models of three sizes. Sizes are of the checkpoint: model, master
weights and Adam's moments. `pause` is the time in which no step is made; the last column is the ratio of the pauses.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WIDTHS = ((256, 4), (512, 8), (1024, 8))
"""Hidden size and layers of the models."""
REPEATS = 3


def measure(rank: int, config: Any, folder: Path) -> dict[str, float]:
    """Seconds of each, the median of a few; collective."""
    import torch.distributed as dist

    from nemo_opd.checkpoint import commit
    from nemo_opd.checkpoint.store import CheckpointStore, RunState
    from nemo_opd.processes import Processes
    from tests.contract.trainers import batch_for, build

    trainer = build(config)
    trainer.train_step(batch_for(trainer.place, 0))
    store = CheckpointStore(folder, Processes.current(), 1)
    found: dict[str, list[float]] = {}

    def timed(name: str, begin: float) -> None:
        dist.barrier()
        found.setdefault(name, []).append(time.perf_counter() - begin)

    step = 0
    for repeat in range(REPEATS + 1):
        step += 1
        dist.barrier()
        begin = time.perf_counter()
        path = store.save(trainer, RunState(step=step), "")
        if repeat:  # the first makes the page cache and the allocator warm
            timed("pause_sync", begin)
        step += 1
        dist.barrier()
        begin = time.perf_counter()
        store.save(trainer, RunState(step=step), "", background=True)
        dist.barrier()
        copied = time.perf_counter()
        assert store._thread is not None
        store._thread.join()
        dist.barrier()
        written = time.perf_counter()
        store.poll()  # as the loop does after every step
        if repeat:
            timed("total_async", begin)
            found.setdefault("copy", []).append(copied - begin)
            found.setdefault("pause_async", []).append(copied - begin + time.perf_counter() - written)
        store.wait()
    size = sum(entry.size for entry in commit.read_manifest(store._path(step)).files.values())
    dist.barrier()
    begin = time.perf_counter()
    path = CheckpointStore(folder, Processes.current(), 1).newest()
    timed("verify", begin)
    assert path is not None
    begin = time.perf_counter()
    trainer.load(path / "model")
    timed("load", begin)
    return {"megabytes": size / 1e6, **{name: sorted(values)[len(values) // 2] for name, values in found.items()}}


def row(width: int, layers: int, pool: Any) -> str:
    """One line of the table."""
    from tests.helpers.megatron import recipe
    from tests.helpers.tiny import tiny_checkpoint

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers, "vocab_size": 91}
        heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 128, "head_dim": 64}
        config = recipe(tiny_checkpoint(folder / "model", **sizes, **heads), student__tensor_model_parallel_size=2)
        got = pool.run(measure, config, folder / "run", timeout=580)[0]
        shutil.rmtree(folder / "run")
    return (
        f"| {width} x {layers} | {got['megabytes']:.0f} | {got['pause_sync']:.2f} | {got['pause_async']:.3f} | "
        f"{got['copy']:.3f} | {got['total_async']:.2f} | {got['verify']:.2f} | {got['load']:.2f} | "
        f"{got['pause_async'] / got['pause_sync']:.2f} |"
    )


def main() -> int:
    from tests.helpers.ranks import RankPool

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    lines = [
        "| model | MB | sync: pause (s) | async: pause (s) | of it the copy (s) "
        "| async: copied, written, committed (s) | verify (s) | load (s) | pause async/sync |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    pool = RankPool(2)
    try:
        for width, layers in WIDTHS:
            lines.append(row(width, layers, pool))
            sys.stdout.write(lines[-1] + "\n")
            sys.stdout.flush()
    finally:
        pool.close()
    load = os.getloadavg()[0]
    machine = f"{platform.machine()}, {os.cpu_count()} cores, load average {load:.1f} at the end"
    lines.append(f"\n{machine}; median of {REPEATS}.")
    table = "\n".join(lines) + "\n"
    sys.stdout.write(table)
    if args.out:
        args.out.write_text(f"# Cost of checkpoints\n\n`python benchmarks/checkpoint.py`\n\n{table}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
