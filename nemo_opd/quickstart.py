"""The quickstart: from nothing to a distilled student, with the same commands that a user would type.

Data and tokenizer -> teacher (SFT from scratch) -> student (short SFT warm-up) -> on-policy distillation with the
student at TP 2 and the teacher at PP 2 over two processes -> for comparison, the same warm-up given as many more steps
of SFT -> evaluation of all four -> the exported student answers the same through plain transformers.

Every stage is a run of its own below ``runs/quickstart``; a second start skips what is done and resumes what is not.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

RECIPES = Path("recipes/quickstart")
HELD_OUT = 1000
"""Problems of the final evaluation, one sampled answer each."""


@dataclass(frozen=True)
class Row:
    """One line of the final table."""

    label: str
    model: Path
    steps: str


class Quickstart:
    """Runs the stages below one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "data"

    def run(self) -> int:
        begin = time.monotonic()
        self.make_data()
        for stage in ("teacher", "warmup", "distil", "more_sft", "clean_sft"):
            self.train(stage)
        results = self.evaluate()
        self.check_export()
        self.report(results, time.monotonic() - begin)
        return 0

    def make_data(self) -> None:
        """Problems, tokenizer and two untrained models."""
        if (self.folder / "student-init" / "config.json").exists():
            return
        recipe = json.loads((RECIPES / "task.json").read_text())
        self.command("data", "arithmetic", str(self.data), *recipe["data"])
        self.command("data", "arithmetic", str(self.folder / "student-data"), *recipe["student_data"])
        for name in ("teacher", "student"):
            target = str(self.folder / f"{name}-init")
            self.command("data", "model", target, "--tokenizer", str(self.data / "tokenizer"), *recipe[name])

    def train(self, stage: str) -> None:
        """One run, unless its outcome says that it is done."""
        outcome = self.folder / stage / "outcome.json"
        if outcome.exists() and json.loads(outcome.read_text())["status"] == "done":
            say(f"{stage}: done before")
            return
        self.command("train", str(RECIPES / f"{stage}.yaml"))

    def rows(self) -> list[Row]:
        def steps(stage: str) -> int:
            return int(json.loads((self.folder / stage / "outcome.json").read_text())["step"])

        warmup, distil, more, clean = map(steps, ("warmup", "distil", "more_sft", "clean_sft"))
        return [
            Row("teacher", self.folder / "teacher" / "model", f"{steps('teacher')} SFT"),
            Row("student before (warm-up)", self.folder / "warmup" / "model", f"{warmup} SFT"),
            Row("student after OPD", self.folder / "distil" / "model", f"{warmup} SFT + {distil} OPD"),
            Row("student, more SFT on its data", self.folder / "more_sft" / "model", f"{warmup} SFT + {more} SFT"),
            Row(
                "student, SFT on the teacher's data", self.folder / "clean_sft" / "model", f"{warmup} SFT + {clean} SFT"
            ),
        ]

    def evaluate(self) -> list[tuple[Row, dict]]:
        """avg@1 of every model on the same held-out problems, each model evaluated once and remembered."""
        results = []
        for row in self.rows():
            out = row.model.parent / "evaluation.json"
            if not out.exists():
                self.command(
                    "eval", str(row.model), "--data", str(self.data / "heldout.jsonl"), "--out", str(out),
                    "verify.name=integer", "verify.answer_pattern=#", "rollout.max_new_tokens=64",
                    f"evaluate.problems={HELD_OUT}", "rollout.batch_size=250",
                )  # fmt: skip
            results.append((row, json.loads(out.read_text())))
        return results

    def check_export(self) -> None:
        """The exported student, loaded by plain transformers, gives the greedy answers that our generator gives."""
        self.command("eval", str(self.folder / "distil" / "model"), "--data", str(self.data / "heldout.jsonl"),
                     "--compare-transformers", "--out", str(self.folder / "distil" / "transformers.json"),
                     "evaluate.problems=32", "evaluate.greedy=true", "verify.name=integer",
                     "verify.answer_pattern=#", "rollout.max_new_tokens=64")  # fmt: skip

    def report(self, results: list[tuple[Row, dict]], seconds: float) -> None:
        text = table(results)
        (self.folder / "table.md").write_text(text + "\n")
        distil = self.folder / "distil"
        say(
            f"\n{text}\n\n{self.verdict(results)}\n{seconds / 60:.1f} minutes in all.\n\n"
            f"Run folder:  {distil}  (metrics.jsonl, rollouts/, checkpoints/, config.yaml)\n"
            f"Student:     {distil / 'model'}  (Hugging Face format)\n"
            f"Curves:      .venv/bin/tensorboard --logdir {self.folder}\n"
            f"Next:        .venv/bin/nemo-opd train {RECIPES / 'distil.yaml'} run.dir=runs/mine optimizer.lr=3e-4\n"
            '             and README.md, "Distil your own models"'
        )

    @staticmethod
    def verdict(results: list[tuple[Row, dict]]) -> str:
        teacher, before, after, sft, clean = (result["estimates"][0]["value"] for _, result in results)
        gap = teacher - before
        if gap <= 0:
            return "The warmed-up student is not below the teacher: nothing to distil."
        return (
            f"Of the gap of {gap:.3f} between warmed-up student and teacher, on-policy distillation closed "
            f"{(after - before) / gap:.0%}.\nThe same number of further SFT steps on the student's own data (2,000 "
            f"solutions, half of them with a wrong step) closed {(sft - before) / gap:.0%},\nand on the 20,000 clean "
            f"solutions that the teacher learned from, {(clean - before) / gap:.0%}: OPD does without any solution."
        )

    def command(self, *arguments: str) -> None:
        """Run one `nemo-opd` command and stop the quickstart when it fails."""
        say(f"\n$ nemo-opd {shlex.join(arguments)}")
        code = subprocess.run([sys.executable, "-m", "nemo_opd.cli", *arguments], check=False).returncode
        if code:
            raise SystemExit(code)


def table(results: list[tuple[Row, dict]]) -> str:
    """A Markdown table of accuracies with their 95 % intervals."""
    lines = ["| model | gradient steps | accuracy | 95 % interval | problems |", "|---|---|---|---|---|"]
    for row, result in results:
        accuracy = result["estimates"][0]
        lines.append(
            f"| {row.label} | {row.steps} | {accuracy['value']:.3f} | {accuracy['low']:.3f} to {accuracy['high']:.3f} "
            f"| {accuracy['problems']} |"
        )
    return "\n".join(lines)


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m nemo_opd.quickstart", description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/quickstart"), help="where everything is written")
    return Quickstart(parser.parse_args().folder).run()


if __name__ == "__main__":
    raise SystemExit(main())
