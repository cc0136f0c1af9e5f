"""What watching a run costs: the share of a step that measurements, diagnosis and records take.

    python -m benchmarks.diagnosis RUN [--out FILE]      RUN: a run folder, for the parts outside of the loss

Outside of the loss every run times itself (`time/measure`, `time/diagnosis`, `time/record`). Inside of it the calls
that make metrics are timed, those included that were there before any diagnosis: an upper bound. CPU time of one
thread, the least of the repeats: other work on the machine can only add. Not measured: one all-reduce of one number per
step, by which all ranks take the same decision.
"""

from __future__ import annotations

import argparse
import json
import pkgutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.losses import Case, Inputs, _ours
from benchmarks.step import machine
from nemo_opd.observe.measure import rollout_metrics
from nemo_opd.types import Finish, Prompt, Rollout

SKIP = 5
"""Steps at the start of a run that are left out."""
PARTS = {"measure": "lengths, endings, 3-grams", "diagnosis": "rules of all signs", "record": "saved rollouts, tokens"}
LOSSES = ("reverse_kl", "tail")
SMALL: dict[str, Any] = {"tokens": 1920, "vocab": 64, "hidden": 128, "teacher_hidden": 192, "chunk": 256}
"""A step of the quickstart's distillation."""
LARGE: dict[str, Any] = {"tokens": 512, "vocab": 65_536, "hidden": 512, "teacher_hidden": 1024, "chunk": 256}
LONG_STEP = (512, 4096)
"""Responses and tokens of each in a step as large models have it."""


WATCHED = (
    *((f"nemo_opd.vocab.{module}", "standard_metrics") for module in ("divergence", "reduced", "generic")),
    *(("nemo_opd.vocab.fused", name) for name in ("by_position", "picked_tokens")),
    *(("nemo_opd.vocab.fused:_Job", name) for name in ("_keep", "_count")),
    *(("nemo_opd.vocab.reduced", name) for name in ("pack_top", "least_of_top", "overlap_above")),
)
"""All that makes metrics inside of the loss, also those that were there before any diagnosis."""


@contextmanager
def timed() -> Iterator[list[float]]:
    """CPU seconds of every call of what is watched."""
    seconds: list[float] = []

    def watch(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            begin = time.process_time()
            result = function(*args)
            seconds.append(time.process_time() - begin)
            return result

        return call

    with ExitStack() as stack:
        for place, name in WATCHED:
            owner = pkgutil.resolve_name(place)
            stack.enter_context(patch.object(owner, name, watch(getattr(owner, name))))
        yield seconds


def loss_costs(loss: str, sizes: Mapping[str, Any], repeats: int) -> tuple[float, float]:
    """(CPU seconds that making metrics takes, their share of loss and gradients): the least of the repeats."""
    case = Case("ours", loss, **sizes)
    inputs = Inputs(case)
    value = _ours(case, inputs, 0, None)
    costs = []
    for _ in range(repeats):
        inputs.hidden.grad = inputs.weight.grad = None
        with timed() as seconds:
            begin = time.process_time()
            value().backward()
            costs.append((sum(seconds), sum(seconds) / (time.process_time() - begin)))
    assert seconds
    return min(costs)


def long_step_seconds() -> float:
    """Seconds of the measurements on the rollouts of a large step."""
    count, length = LONG_STEP
    prompt = Prompt(0, 0, (), (1,))
    ids = torch.randint(0, 150_000, (count, length))
    empty = torch.zeros(0)
    rollouts = [
        Rollout(prompt, i, row, empty, empty, empty, empty, Finish.EOS, reward=0.0) for i, row in enumerate(ids)
    ]
    begin = time.perf_counter()
    rollout_metrics(rollouts)
    return time.perf_counter() - begin


def run_shares(run: Path) -> tuple[list[tuple[str, float, float]], float]:
    """((part, mean seconds, share of the step) ..., seconds of a step)."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "evaluation" not in line][SKIP:]
    total = statistics.fmean(step["time/total"] for step in steps)
    rows = []
    for part in PARTS:
        seconds = statistics.fmean(step[f"time/{part}"] for step in steps)
        rows.append((part, seconds, seconds / total))
    return rows, total


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, help="write the table there too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, total = run_shares(args.run)
    text = ["| part | seconds per step | share of the step |", "|---|---|---|"]
    text += [f"| {part}: {PARTS[part]} | {seconds:.5f} | {share:.2%} |" for part, seconds, share in rows]
    inside, large = 0.0, []
    for loss in LOSSES:
        seconds, _ = loss_costs(loss, SMALL, args.repeats)
        inside = max(inside, seconds)
        text.append(f"| all metrics inside of the loss, {loss} | {seconds:.5f} | {seconds / total:.2%} |")
        large.append(f"{loss_costs(loss, LARGE, args.repeats)[1]:.2%} ({loss})")
    text.append(f"| **all** | | **at most {sum(share for *_, share in rows) + inside / total:.2%}** |")
    text += [
        "",
        f"Means of the steps of {args.run.name}, {total:.3f} s each. Inside of the loss: {SMALL['tokens']:,} tokens "
        f"and a vocabulary of {SMALL['vocab']}. With a vocabulary of {LARGE['vocab']:,} and widths of "
        f"{LARGE['hidden']} and {LARGE['teacher_hidden']:,} all metrics take {' and '.join(large)} of the loss. "
        f"Lengths, endings and 3-grams of {LONG_STEP[0]} responses of {LONG_STEP[1]:,} tokens take "
        f"{long_step_seconds():.2f} s, on every rank at once. {machine()}.",
    ]
    print("\n".join(text))
    if args.out:
        command = f"python -m benchmarks.diagnosis {args.run}"
        args.out.write_text(f"# What watching a run costs\n\n`{command}`\n\n" + "\n".join(text) + "\n")


if __name__ == "__main__":
    main()
