"""What watching a run costs: the share of a step that measurements, diagnosis and records take.

    python -m benchmarks.diagnosis RUN [--out FILE]      RUN: a run folder, for the parts outside of the loss

Outside of the loss every run times itself (`time/measure`, `time/diagnosis`, `time/record`). Inside of it the numbers
are made between matrix products, so there the loss is computed with and without them, in turn, in one thread, and CPU
time is compared (the least of the repeats: other work on the machine can only add). Not measured: one all-reduce of one
number per step, by which all ranks take the same decision.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Mapping
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
LONG_STEP = (512, 4096)
"""Responses and tokens of each in a step as large models have it."""


@contextmanager
def as_before() -> Iterator[None]:
    """Without the numbers that are there for the diagnosis and the report alone."""
    from nemo_opd.vocab import chunk, fused

    standard = chunk.standard_metrics
    dropped = ("importance_out_of_bounds", "teacher_logprob")

    def fewer(*args: Any) -> Mapping[str, Any]:
        return {name: value for name, value in standard(*args).items() if name not in dropped}

    with ExitStack() as stack:
        for module in ("divergence", "reduced", "generic"):
            stack.enter_context(patch(f"nemo_opd.vocab.{module}.standard_metrics", fewer))
        stack.enter_context(patch("nemo_opd.vocab.reduced.is_measurable", lambda objective: False))
        stack.enter_context(patch.object(fused, "TOKEN_SCORES", ()))
        nobody = torch.empty(0, dtype=torch.int64)
        stack.enter_context(patch.object(fused, "picked_tokens", lambda loss, tokens, starts: [nobody for _ in starts]))
        yield


def loss_seconds(loss: str, repeats: int) -> tuple[float, float]:
    """CPU seconds of loss and gradients (with, without) the measurements."""
    case = Case("ours", loss, tokens=512, vocab=65_536, hidden=512, teacher_hidden=1024, chunk=256)
    inputs = Inputs(case)
    value = _ours(case, inputs, 0, None)

    def once() -> float:
        inputs.hidden.grad = inputs.weight.grad = None
        begin = time.process_time()
        value().backward()
        return time.process_time() - begin

    once()
    found: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(repeats):
        found[True].append(once())
        with as_before():
            found[False].append(once())
    return min(found[True]), min(found[False])


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


def run_shares(run: Path) -> tuple[list[tuple[str, float, float]], float, float]:
    """((part, mean seconds, share of the step) ..., seconds of a step, share of forward and backward)."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "evaluation" not in line][SKIP:]
    total = statistics.fmean(step["time/total"] for step in steps)
    rows = []
    for part in PARTS:
        seconds = statistics.fmean(step[f"time/{part}"] for step in steps)
        rows.append((part, seconds, seconds / total))
    return rows, total, statistics.fmean(step["time/forward_backward"] for step in steps) / total


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, help="write the table there too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, total, backward = run_shares(args.run)
    text = ["| part | seconds per step | share of the step |", "|---|---|---|"]
    text += [f"| {part}: {PARTS[part]} | {seconds:.5f} | {share:.2%} |" for part, seconds, share in rows]
    worst = 0.0
    for loss in LOSSES:
        with_numbers, without = loss_seconds(loss, args.repeats)
        share = max(0.0, with_numbers / without - 1.0)
        worst = max(worst, share)
        text.append(
            f"| numbers inside of the loss, {loss} | {share:.2%} of the loss | at most {share * backward:.2%} |"
        )
    text.append(f"| **all** | | **at most {sum(share for *_, share in rows) + worst * backward:.2%}** |")
    text += [
        "",
        f"Means of the steps of {args.run.name} ({total:.3f} s each, of which forward and backward {backward:.0%}). "
        f"The loss: 512 tokens, vocabulary 65,536, widths 512 and 1,024, one thread, CPU time, least of "
        f"{args.repeats}. "
        f"Lengths, endings and 3-grams of {LONG_STEP[0]} responses of {LONG_STEP[1]:,} tokens take "
        f"{long_step_seconds():.2f} s, on every rank at once. {machine()}.",
    ]
    print("\n".join(text))
    if args.out:
        command = f"python -m benchmarks.diagnosis {args.run}"
        args.out.write_text(f"# What watching a run costs\n\n`{command}`\n\n" + "\n".join(text) + "\n")


if __name__ == "__main__":
    main()
