"""What nemo_opd promises when things go wrong, with the figures of its tests: runs them and writes the table.

    make chaos                              every test of a promise, as often as the promise says
    python -m benchmarks.promises --short   a few times each, as `make test` does

The tests are those of tests/ that call `tests.helpers.figures.record`; this page only gathers what they counted. A
promise whose test failed has no figure, and the command ends with 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.step import machine

ROOT = Path(__file__).parents[1]

PROMISES = {
    "R1": "Whatever dies, the newest committed checkpoint loads",
    "R2": "A resumed run is the undisturbed one, bit for bit",
    "R3": "A checkpoint loads under another layout, optimizer included",
    "R4": "Corruption is found and named, and the checkpoint before it is used",
    "R5": "No prompt is lost or repeated",
    "R6": "An asynchronous save equals a synchronous one; its failure is heard",
    "R7": "A non-finite or wild gradient is skipped by all ranks alike, and does not blind the guard",
    "R8": "A preemption saves at the same step on all ranks and is requeued once",
    "R9": "A hang is named: rank, section, age",
    "R10": "The crash of a rank changes no result",
    "R11": "A straggler is named, without false alarms",
    "R12": "A refit is all or nothing",
    "R13": "A teacher's failure never becomes a number",
    "R14": "Retention never removes the last good checkpoint, full disk included",
    "R15": "The layout does not change the gradient",
    "R16": "A deterministic crash stops",
}


def recording_tests() -> list[str]:
    """Those that record a figure."""
    named = "from tests.helpers.figures import"
    return sorted(
        str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py") if named in path.read_text()
    )


def run_tests(figures: Path, full: bool, chosen: Sequence[str]) -> int:
    """pytest's exit code."""
    environment = {**os.environ, "NEMO_OPD_FIGURES": str(figures)} | ({"NEMO_OPD_CHAOS": "full"} if full else {})
    command = [sys.executable, "-m", "pytest", "-q", "-o", "timeout=3600", *(chosen or recording_tests())]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def table(figures: Sequence[Mapping[str, str]]) -> list[str]:
    """Lines of Markdown: a row for each figure, by promise; a promise without one says so."""
    lines = ["| | promise | figure | measured |", "|---|---|---|---|"]
    for promise, text in PROMISES.items():
        rows = [figure for figure in figures if figure["promise"] == promise]
        for number, row in enumerate(rows or [{"what": "none in this run", "value": "-"}]):
            head = f"| {promise} | {text}" if not number else "| | "
            lines.append(f"{head} | {row['what']} | {row['value']} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tests", nargs="*", help="files or tests for pytest; none: all that record a figure")
    parser.add_argument("--short", action="store_true", help="as often as `make test` does")
    parser.add_argument("--out", type=Path, help="write the table there too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "figures.jsonl"
        code = run_tests(file, not args.short, args.tests)
        figures = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    command = "python -m benchmarks.promises --short" if args.short else "make chaos"
    text = ["# Promises, measured", "", f"    {command}", "", *table(figures), "", f"{machine()}."]
    if code:
        text.append(f"\nSome tests did not pass (pytest ended with {code}): their promises have no figure here.")
    print("\n".join(text))
    if args.out:
        args.out.write_text("\n".join(text) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
