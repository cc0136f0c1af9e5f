"""What rollouts ahead save: runs with `rollout.staleness` 0 and 1, a core for the trainer and a core for the server.

See `benchmarks.rollout`, whose subcommand this is. Both runs are whole ones over the command line: Megatron student and
teacher, one server, the same prompts and seeds, a learning rate at which nothing is learnt. Of a step with staleness 0,

    rollout    what it waits for its rollouts (`time/rollout`)
    train      all the rest: scores, the step itself, the refit, what is written down

take turns; ahead of each other they would take the longer of the two at least. A refit belongs to both, as servers do
not write meanwhile, and is counted for the trainer: the ideal is a little too good.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from nemo_opd.engines.vllm.local import LocalServers
from nemo_opd.engines.vllm.settings import WRITER, ServerSettings
from nemo_opd.tasks.arithmetic import ArithmeticTask, write
from nemo_opd.tasks.models import ModelShape, write_random_model
from nemo_opd.tasks.tokenizer import write_tokenizer

SKIPPED = 3
"""Steps at the start of a run that are not counted."""
TEACHER = ModelShape(hidden_size=128, layers=2, heads=4, kv_heads=2, ffn=384, head_dim=32)


@dataclass(frozen=True)
class Times:
    """Of a run's steps after the first: means, in seconds, and tokens."""

    step: float
    rollout: float
    tokens: float

    @property
    def train(self) -> float:
        return self.step - self.rollout


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=20, help=f"of a run; {SKIPPED} are not counted (default 20)")
    parser.add_argument("--prompts", type=int, default=16, help="of a step (default %(default)s)")
    parser.add_argument("--samples", type=int, default=4, help="of a prompt (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="of a response at most (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind, in turns (default %(default)s)")
    parser.add_argument("--out", type=Path, help="write the table there too")


def table(args: argparse.Namespace, student: ModelShape) -> list[str]:
    """Lines of Markdown, a row for each repeat."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit(f"got {len(cores)} core; expected two, one for the trainer and one for the server")
    rows = [
        "| repeat | tokens a step | rollout | train | staleness 0 | staleness 1 | ideal | staleness 1 / ideal |",
        "|---|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write(folder, ArithmeticTask(terms=4), 10_000, 16, noise=0.0, seed=0)
        write_tokenizer(folder / "tokenizer")
        for name, shape, seed in (("student", student, 0), ("teacher", TEACHER, 1)):
            write_random_model(folder / name, folder / "tokenizer", shape=shape, seed=seed)
        local = LocalServers(folder / "logs", folder)
        try:
            url = start(local, folder, args, cores[1])
            for repeat in range(args.repeats):
                found = [timed_run(folder, args, url, staleness, repeat, cores[0]) for staleness in (0, 1)]
                rows.append(row(repeat, *found))
                print(rows[-1], flush=True)
        finally:
            local.close()
    return rows


def row(repeat: int, turns: Times, ahead: Times) -> str:
    """The ideal is that of the run by turns."""
    ideal = max(turns.rollout, turns.train)
    return (
        f"| {repeat} | {turns.tokens:,.0f} | {turns.rollout:.3f} s | {turns.train:.3f} s | {turns.step:.3f} s | "
        f"{ahead.step:.3f} s | {ideal:.3f} s | {ahead.step / ideal:.2f} |"
    )


def start(local: LocalServers, folder: Path, args: argparse.Namespace, core: int) -> str:
    """A server on one core; its address."""
    settings = ServerSettings(
        model=str(folder / "student"),
        role=WRITER,
        ready_file="",
        weights_dir=str(folder),
        dtype="float32",
        max_running=args.prompts * args.samples,
    )
    everywhere = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})  # what is started inherits it
    try:
        local.start("0", settings, {"OMP_NUM_THREADS": "1"})
    finally:
        os.sched_setaffinity(0, everywhere)
    return local.urls(600.0)[0]


def timed_run(folder: Path, args: argparse.Namespace, url: str, staleness: int, repeat: int, core: int) -> Times:
    run_dir = folder / f"run-{staleness}-{repeat}"
    settings = [
        f"run.dir={run_dir}",
        f"student.model={folder / 'student'}",
        "student.dtype=float32",
        f"teacher.model={folder / 'teacher'}",
        "teacher.dtype=float32",
        f"data.path={folder / 'train.jsonl'}",
        "data.max_prompt_tokens=32",
        "rollout.engine=vllm",
        f"rollout.servers.urls={url}",
        f"rollout.servers.weights_dir={folder}",
        f"rollout.staleness={staleness}",
        f"rollout.batch_size={args.prompts * args.samples}",
        f"rollout.max_new_tokens={args.tokens}",
        f"rollout.samples_per_prompt={args.samples}",
        "rollout.dtype=float32",
        f"train.steps={args.steps}",
        f"train.prompts_per_step={args.prompts}",
        "train.micro_batch_tokens=1024",
        "optimizer.lr=1e-9",
        "checkpoint.export_at_end=false",
        "observe.progress=false",
        "observe.rollouts_per_step=0",
    ]
    recipe = folder / "recipe.yaml"
    recipe.write_text("{}\n")
    subprocess.run(
        ["taskset", "-c", str(core), sys.executable, "-m", "nemo_opd.cli", "train", str(recipe), *settings],
        check=True,
        stdout=sys.stderr,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return times([line for line in lines if "time/rollout" in line][SKIPPED:])


def times(steps: Sequence[Mapping[str, float]]) -> Times:
    """All tokens of a step are written here, so that their speed says how long it took."""
    seconds = mean(step["tokens/written"] / step["speed/tokens_per_second"] for step in steps)
    return Times(seconds, mean(step["time/rollout"] for step in steps), mean(step["tokens/written"] for step in steps))
