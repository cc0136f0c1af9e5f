"""What the diagnosis says, at its present thresholds, of runs that were made before: a table to judge thresholds by.

    python -m benchmarks.replay_diagnosis RUN [RUN ...] [--out FILE]

For each run the steps at which each sign was first seen, beside how the run ended. A sign whose metric a run did not
write (older code) is not judged.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

from benchmarks.step import machine
from nemo_opd.config import DiagnoseConfig
from nemo_opd.diagnosis.diagnosis import Diagnosis


def replay(lines: list[dict[str, Any]]) -> dict[str, int]:
    """First step of every sign that was seen."""
    diagnosis, first = Diagnosis(DiagnoseConfig(stop=False), {}), {}
    for line in lines:
        metrics = {name: value for name, value in line.items() if isinstance(value, float)}
        for finding in diagnosis.look(line["step"], metrics).said:
            first.setdefault(finding.sign, finding.step)
    return first


def row(run: Path) -> str:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "evaluation" not in line]
    accuracy = [line["evaluation/avg@1"] for line in lines if "evaluation/avg@1" in line]
    rewards = [line["reward/mean"] for line in steps if "reward/mean" in line]
    signs = ", ".join(f"{sign} at {step}" for sign, step in replay(steps).items()) or "none"
    final = f"{accuracy[-1]:.3f}" if accuracy else ""
    best = f"{max(rewards):.2f}, {rewards[-1]:.2f}" if rewards else ""
    return f"| {run.parent.name}/{run.name} | {len(steps)} | {best} | {final} | {signs} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--out", type=Path, help="write the table there too")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    head = "| run | steps | reward: best step, last step | accuracy at the end | signs |\n|---|---|---|---|---|"
    text = "\n".join([head, *(row(run) for run in args.runs), "", f"{machine()}."])
    print(text)
    if args.out:
        args.out.write_text(f"# What the diagnosis says of runs\n\n`python -m benchmarks.replay_diagnosis`\n\n{text}\n")


if __name__ == "__main__":
    main()
