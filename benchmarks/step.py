"""Where the time of a training step goes: a table from the metrics.jsonl that every run writes.

    .venv/bin/python benchmarks/step.py                              the quickstart's distillation, once it has run
    .venv/bin/python benchmarks/step.py RUN [--skip N] [--out FILE]  any run

Per part of a step: median seconds, share of the step, and the tokens that the part handled per second. `rest` is our
own overhead: everything that is neither writing, scoring, training nor refitting. Times are rank 0's wall clock, so a
part includes waiting for slower ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from datetime import date
from importlib.metadata import version
from pathlib import Path

PARTS = ("rollout", "score", "forward_backward", "optimizer", "refit", "pack", "rest")
TOKENS = {"rollout": "tokens/written", "score": "tokens/trained", "forward_backward": "tokens/trained"}


def read_steps(run: Path, skip: int) -> list[dict[str, float]]:
    """The run's steps, without the first `skip` (warm-up) and without evaluations."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "evaluation" not in line][skip:]


def table(steps: list[dict[str, float]]) -> str:
    total = statistics.median(step["time/total"] for step in steps)
    rows = ["| part | seconds | share | tokens/s |", "|---|---|---|---|"]
    for part in PARTS:
        seconds = statistics.median(step.get(f"time/{part}", 0.0) for step in steps)
        rate = ""
        if part in TOKENS and seconds:
            rate = f"{statistics.median(step[TOKENS[part]] for step in steps) / seconds:,.0f}"
        rows.append(f"| {part.replace('_', '-')} | {seconds:.4f} | {seconds / total:.1%} | {rate} |")
    tokens = statistics.median(step["tokens/trained"] for step in steps)
    rows.append(f"| **step** | {total:.4f} | 100 % | {tokens / total:,.0f} |")
    return "\n".join(rows)


def machine() -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core", "transformers"))
    cores = len(os.sched_getaffinity(0))
    return f"{date.today()}, {platform.machine()}, {cores} cores, Python {platform.python_version()}, {versions}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", nargs="?", type=Path, default=Path("runs/quickstart/distil"))
    parser.add_argument("--skip", type=int, default=5, help="steps left out at the start (default %(default)s)")
    parser.add_argument("--out", type=Path, help="write the table there too")
    args = parser.parse_args()
    steps = read_steps(args.run, args.skip)
    text = f"{table(steps)}\n\nMedian of {len(steps)} steps of {args.run}. {machine()}."
    print(text)
    if args.out:
        args.out.write_text(f"# Time of a step\n\n`python benchmarks/step.py {args.run}`\n\n{text}\n")


if __name__ == "__main__":
    main()
