"""The quickstart: from nothing to a distilled student, with the same commands that a user would type.

Data and tokenizer -> teacher (SFT from scratch) -> student (short SFT warm-up) -> on-policy distillation with the
student at TP 2 and the teacher at PP 2 over two processes -> for comparison, the same warm-up given as many more steps
of SFT -> the exported student answers the same through plain transformers -> one table.

Every stage is a run of its own below ``runs/quickstart`` and ends with an evaluation on the same held-out problems. A
second start skips what is done and resumes what is not; Ctrl-C reaches the stage, which saves and ends.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

RECIPES = Path("recipes/quickstart")
FOLDER = Path("runs/quickstart")
"""Where the recipes say that everything lies."""
ACCURACY = "evaluation/avg@1"


@dataclass(frozen=True)
class Row:
    """One line of the final table."""

    label: str
    stage: str
    steps: str


class Quickstart:
    """Runs the stages, in order."""

    folder = FOLDER
    data = FOLDER / "data"

    def run(self) -> int:
        begin = time.monotonic()
        self.make_data()
        for stage in ("teacher", "warmup", "distil", "more_sft", "clean_sft"):
            self.train(stage)
        self.check_export()
        self.report(self.accuracies(), time.monotonic() - begin)
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
            Row("teacher", "teacher", f"{steps('teacher')} SFT"),
            Row("student before (warm-up)", "warmup", f"{warmup} SFT"),
            Row("student after OPD", "distil", f"{warmup} SFT + {distil} OPD"),
            Row("student, more SFT on its data", "more_sft", f"{warmup} SFT + {more} SFT"),
            Row("student, SFT on the teacher's data", "clean_sft", f"{warmup} SFT + {clean} SFT"),
        ]

    def accuracies(self) -> list[tuple[Row, dict[str, float]]]:
        """What each run measured after its last step, on the same held-out problems."""
        return [(row, last_evaluation(self.folder / row.stage / "metrics.jsonl")) for row in self.rows()]

    def check_export(self) -> None:
        """The exported student, loaded by plain transformers, gives the greedy answers that our generator gives."""
        self.command("eval", str(self.folder / "distil" / "model"), "--data", str(self.data / "heldout.jsonl"),
                     "--compare-transformers", "--out", str(self.folder / "distil" / "transformers.json"),
                     "evaluate.problems=32", "evaluate.greedy=true", "verify.name=integer",
                     "verify.answer_pattern=#", "rollout.max_new_tokens=64")  # fmt: skip

    def report(self, results: list[tuple[Row, dict[str, float]]], seconds: float) -> None:
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
    def verdict(results: list[tuple[Row, dict[str, float]]]) -> str:
        teacher, before, after, sft, clean = (result[ACCURACY] for _, result in results)
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
        # A terminal sends Ctrl-C to the command as well: it saves and ends by itself, and we wait for that.
        before = signal.signal(signal.SIGINT, lambda number, frame: None)
        code = subprocess.Popen([sys.executable, "-m", "nemo_opd.cli", *arguments]).wait()
        signal.signal(signal.SIGINT, before)
        if code:
            say("stopped; the same command goes on from here" if code == 75 else f"the command failed ({code})")
            raise SystemExit(code)


def last_evaluation(metrics: Path) -> dict[str, float]:
    """The last line of a run's metrics.jsonl that an evaluation wrote."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [line for line in lines if "evaluation" in line][-1]


def table(results: list[tuple[Row, dict[str, float]]]) -> str:
    """A Markdown table of accuracies with their 95 % intervals."""
    lines = ["| model | gradient steps | accuracy | 95 % interval | problems |", "|---|---|---|---|---|"]
    for row, result in results:
        value, low, high = (result[f"{ACCURACY}{end}"] for end in ("", "_low", "_high"))
        lines.append(
            f"| {row.label} | {row.steps} | {value:.3f} | {low:.3f} to {high:.3f} "
            f"| {result['evaluation/problems']:.0f} |"
        )
    return "\n".join(lines)


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> int:
    argparse.ArgumentParser(
        prog="python -m nemo_opd.quickstart", description=(__doc__ or "").split("\n")[0]
    ).parse_args()
    if not RECIPES.is_dir():
        say(f"error: {RECIPES}: got no such folder; expected the project's checkout; run it from there")
        return 2
    return Quickstart().run()


if __name__ == "__main__":
    raise SystemExit(main())
