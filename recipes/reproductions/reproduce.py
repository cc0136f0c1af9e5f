"""Runs an experiment: every variant of a recipe for every seed, then one table and one figure.

    python recipes/reproductions/reproduce.py recipes/reproductions/topk_bias [--jobs 2] [--seeds 1 2 3]

An experiment is a folder with `experiment.yaml`:

    prepare    what makes data and models: `run` (a command of `nemo-opd`) or `script` (a file of the folder with its
               arguments), each with the path that it `makes` (then it is skipped)
    recipe     what all variants share
    variants   name: [key=value, ...]; `{seed}` stands for the seed. `script: FILE` trains through a file of the folder
    seeds      numbers
    columns    heading: metric of metrics.jsonl; evaluations and totals at the end, others over the last 10 steps, or
               `METRIC at the start`: in the first step, or {metric, counter, target}: an evaluation's number when a
               total had reached the target
    figure     heading: metric, drawn over the steps
    measure    what is looked at besides (if anything): `commands` of `nemo-opd` that know `--out` and `run.seed`, once
               per seed: `run`, and `rows` (name: path in the JSON file); `columns` (heading: path below the row's)

Every run is a run folder of its own below `runs/reproductions`: a second start resumes what was interrupted and skips
what is done. Table, numbers and figure go beside the experiment (`results.md`, `results.json`, `figure.png`); what they
show, and what they do not, stands in RESULTS.md, by hand.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from scipy.stats import t as student_t
from tqdm import tqdm

RUNS = Path("runs/reproductions")
LAST = 10  # steps at the end of a run over which a training metric is averaged
AT_THE_START = " at the start"

Table = dict[str, dict[str, list[float]]]
"""By row and column, one number per seed."""


@dataclass(frozen=True)
class Job:
    """One variant under one seed."""

    variant: str
    seed: int
    folder: Path
    command: list[str]

    @property
    def done(self) -> bool:
        outcome = self.folder / "outcome.json"
        return outcome.exists() and json.loads(outcome.read_text())["status"] == "done"


def prepare(commands: Sequence[dict[str, Any]], folder: Path) -> None:
    """Data, tokenizers, models: in order, each unless what it makes is there."""
    for command in tqdm(commands, unit="preparation"):
        if not Path(command["makes"]).exists():
            if "script" in command:
                file, *words = command["script"]
                program = [str(folder / file), *words]
            else:
                program = ["-m", "nemo_opd.cli", *command["run"]]
            _check(run([sys.executable, *program], f"{folder.name}-{Path(command['makes']).parent.name}"))


def jobs_of(experiment: dict[str, Any], folder: Path, seeds: Sequence[int]) -> list[Job]:
    """Seed by seed, so that an experiment that is cut short has whole seeds."""
    jobs = []
    for seed in seeds:
        for variant, overrides in experiment["variants"].items():
            script = [word for word in overrides if word.startswith("script: ")]
            program = [str(folder / script[0].removeprefix("script: "))] if script else ["-m", "nemo_opd.cli", "train"]
            settings = [word.replace("{seed}", str(seed)) for word in overrides if word not in script]
            run_dir = RUNS / folder.name / f"{re.sub(r'[^a-zA-Z0-9_.]+', '-', variant)}-{seed}"
            common = [f"run.dir={run_dir}", f"run.seed={seed}", "observe.progress=false"]
            command = [sys.executable, *program, experiment["recipe"], *common, *settings]
            jobs.append(Job(variant, seed, run_dir, command))
    return jobs


def run(command: Sequence[str], name: str) -> tuple[int, str]:
    """One process with one thread; its output goes to a file."""
    log = RUNS / "logs" / f"{name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False, env=environment)
    return done.returncode, str(log)


def run_all(jobs: Sequence[Job], workers: int) -> None:
    waiting = [job for job in jobs if not job.done]
    bar = tqdm(total=len(jobs), initial=len(jobs) - len(waiting), unit="run")
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(run, job.command, f"{job.folder.parent.name}-{job.folder.name}") for job in waiting]
        try:
            for future in concurrent.futures.as_completed(futures):
                _check(future.result())
                bar.update()
        except BaseException:  # what runs ends its run; what waits does not start
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    bar.close()


def _check(result: tuple[int, str]) -> None:
    code, log = result
    if code:
        raise SystemExit(f"a command failed with exit code {code}: see {log}")


def lines_of(job: Job) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]


def value_at(lines: Sequence[dict[str, Any]], metric: str, counter: str, target: float) -> float:
    """An evaluation's number when `counter` had reached `target`: linear between the evaluations around it."""
    by_step = {line["step"]: line[counter] for line in lines if counter in line}
    points = [(by_step[line["step"]], line[metric]) for line in lines if metric in line and line["step"] in by_step]
    for (before, low), (after, high) in itertools.pairwise(points):
        if before <= target <= after and before < after:
            return float(low + (high - low) * (target - before) / (after - before))
    return math.nan


def value(lines: Sequence[dict[str, Any]], metric: str) -> float:
    """The last evaluation's number or total, the mean over the last steps, or the first step's number."""
    name = metric.removesuffix(AT_THE_START)
    found = [line[name] for line in lines if name in line]
    if not found:
        return math.nan
    if name != metric:
        return found[0]
    at_the_end = metric.startswith("evaluation/") or metric.endswith("_total")
    return found[-1] if at_the_end else statistics.fmean(found[-LAST:])


def summary(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds and half of its 95 % interval (Student's t); not a number where a run has none."""
    if len(values) < 2 or any(map(math.isnan, values)):
        return statistics.fmean(values), math.nan
    half = float(student_t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), half


def results(experiment: dict[str, Any], jobs: Sequence[Job]) -> Table:
    """Of the runs, a row per variant."""
    table: Table = {}
    for job in jobs:
        lines = lines_of(job)
        row = table.setdefault(job.variant, {heading: [] for heading in experiment["columns"]})
        for heading, metric in experiment["columns"].items():
            row[heading].append(value_at(lines, **metric) if isinstance(metric, dict) else value(lines, metric))
    return table


def measured(measure: dict[str, Any], folder: Path, seeds: Sequence[int]) -> Table:
    """Of the commands that look at models besides; each runs unless what it writes is there."""
    table: Table = {}
    for number, command in enumerate(tqdm(measure["commands"], unit="measurement")):
        for seed in seeds:
            name = f"{folder.name}-measured-{number}-{seed}"
            out = RUNS / folder.name / "measured" / f"{number}-{seed}.json"
            if not out.exists():
                words = [*command["run"], f"run.seed={seed}", "--out", str(out)]
                _check(run([sys.executable, "-m", "nemo_opd.cli", *words], name))
            found = json.loads(out.read_text())
            for row, path in command["rows"].items():
                for heading, column in measure["columns"].items():
                    table.setdefault(row, {}).setdefault(heading, []).append(at_path(found, f"{path}/{column}"))
    return table


def at_path(found: Any, path: str) -> float:
    """A number of a JSON file, by the keys and list positions that lead to it; NaN for null."""
    for key in path.strip("/").split("/"):
        found = found[int(key)] if isinstance(found, list) else found[key]
    return math.nan if found is None else float(found)


def as_markdown(table: Table, columns: Sequence[str], seeds: int) -> str:
    lines = [f"| variant | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for variant, row in table.items():
        cells = []
        for heading in columns:
            mean, half = summary(row[heading])
            digits = 0 if abs(mean) >= 1000 else 3
            spread = "" if math.isnan(half) else f" ± {half:,.{digits}f}"
            cells.append("-" if math.isnan(mean) else f"{mean:,.{digits}f}{spread}")
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines) + f"\n\nMean over {seeds} seeds ± half of the 95 % interval of the mean (Student's t).\n"


def draw(experiment: dict[str, Any], jobs: Sequence[Job], path: Path) -> None:
    """One panel per metric, one line per variant: the mean over seeds, with their range where there are few lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels, many = experiment["figure"], len(experiment["variants"]) > 10
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.4), squeeze=False)
    for axis, (heading, metric) in zip(axes[0], panels.items(), strict=True):
        for number, variant in enumerate(experiment["variants"]):
            by_step: dict[int, list[float]] = {}
            for job in jobs:
                if job.variant == variant:
                    for line in lines_of(job):
                        if metric in line:
                            by_step.setdefault(line["step"], []).append(line[metric])
            steps = sorted(by_step)
            color = plt.get_cmap("tab20" if many else "tab10")(number)
            axis.plot(steps, [statistics.fmean(by_step[step]) for step in steps], label=variant, color=color)
            if not many:
                low, high = ([end(by_step[step]) for step in steps] for end in (min, max))
                axis.fill_between(steps, low, high, alpha=0.15, color=color)
        axis.set_title(heading)
        axis.set_xlabel("step")
    axes[0][-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--jobs", type=int, default=max(1, len(os.sched_getaffinity(0))), help="runs at a time")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the experiment's own")
    arguments = parser.parse_args()
    experiment = yaml.safe_load((arguments.folder / "experiment.yaml").read_text())
    seeds = arguments.seeds or experiment["seeds"]
    prepare(experiment["prepare"], arguments.folder)
    jobs = jobs_of(experiment, arguments.folder, seeds)
    run_all(jobs, arguments.jobs)
    table = results(experiment, jobs)
    text = as_markdown(table, list(experiment["columns"]), len(seeds))
    numbers: dict[str, Any] = {"seeds": seeds, "results": table}
    if "measure" in experiment:
        numbers["measured"] = measured(experiment["measure"], arguments.folder, seeds)
        text += "\n" + as_markdown(numbers["measured"], list(experiment["measure"]["columns"]), len(seeds))
    (arguments.folder / "results.md").write_text(text)
    (arguments.folder / "results.json").write_text(json.dumps(numbers, indent=1) + "\n")
    draw(experiment, jobs, arguments.folder / "figure.png")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
