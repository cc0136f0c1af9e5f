"""Every variant of every experiment is a recipe that a run would start with; how results are read and summed up."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from nemo_opd.cli import build_parser
from nemo_opd.config import PeersContext
from nemo_opd.configuration.load import load
from nemo_opd.prompts.template import load_tokenizer, render_chat
from nemo_opd.teacher.insertion import ContextRenderer
from nemo_opd.teacher.peers import Peers
from tests.helpers.rollouts import make_prompt, make_rollout, saying
from tests.helpers.workspace import make_workspace

FOLDER = Path(__file__).parents[2] / "recipes" / "reproductions"
EXPERIMENTS = sorted(path.parent for path in FOLDER.glob("*/experiment.yaml"))


@pytest.fixture(scope="module")
def reproduce() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reproduce", FOLDER / "reproduce.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("experiments"), problems=20)


@pytest.mark.parametrize("folder", EXPERIMENTS, ids=lambda path: path.name)
def test_every_variant_can_be_started(folder: Path, world: Path, reproduce: ModuleType) -> None:
    experiment = yaml.safe_load((folder / "experiment.yaml").read_text())
    recipe = FOLDER.parents[1] / experiment["recipe"]
    assert set(experiment["figure"].values()) and len(experiment["seeds"]) >= 3
    for job in reproduce.jobs_of(experiment, folder, [1]):
        settings = [word for word in job.command if "=" in word and not word.startswith(("student.model", "data.path"))]
        settings = [word for word in settings if not word.startswith("evaluate.path")]
        files = [f"student.model={world / 'student'}", f"data.path={world / 'train.jsonl'}"]
        files.append(f"evaluate.path={world / 'heldout.jsonl'}")
        if "teacher" in yaml.safe_load(recipe.read_text()) and "teacher.engine=none" not in settings:
            files.append(f"teacher.model={world / 'teacher'}")
        load(recipe, [*settings, *files])


@pytest.mark.slow
def test_a_small_experiment_from_recipe_to_table_and_figure(tmp_path: Path) -> None:
    """The biased loss beside its correction, for a few steps; a second start has nothing left to do."""
    make_workspace(tmp_path, problems=20)
    experiment = tmp_path / "experiment"
    shutil.copytree(FOLDER / "topk_bias", experiment, ignore=shutil.ignore_patterns("*.md", "*.png", "*.json"))
    sections = yaml.safe_load((FOLDER / "topk_bias" / "experiment.yaml").read_text())
    names = ["naive k=1", "stop_gradient k=1"]
    sections |= {"prepare": [], "recipe": "recipe.yaml", "seeds": [1, 2]}
    sections["variants"] = {name: sections["variants"][name] for name in names}
    recipe = yaml.safe_load((FOLDER / "topk_bias" / "opd.yaml").read_text())
    for section, field, file in (("student", "model", "student"), ("teacher", "model", "teacher"),
                                 ("data", "path", "train.jsonl"), ("evaluate", "path", "heldout.jsonl")):  # fmt: skip
        recipe[section][field] = str(tmp_path / file)
    recipe["train"] |= {"steps": 3, "prompts_per_step": 4}
    recipe["optimizer"]["warmup_steps"] = 0
    recipe["rollout"]["max_new_tokens"] = 12
    (experiment / "experiment.yaml").write_text(yaml.safe_dump(sections, sort_keys=False))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, str(FOLDER / "reproduce.py"), str(experiment), "--jobs", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert all(f"| {name} |" in done.stdout for name in names)
    numbers = json.loads((experiment / "results.json").read_text())["results"]
    assert all(len(column) == 2 for row in numbers.values() for column in row.values())
    assert (experiment / "figure.png").stat().st_size > 1000
    outcomes = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/**/outcome.json")}
    assert len(outcomes) == 4
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=600).returncode == 0
    assert outcomes == {path: path.stat().st_mtime_ns for path in outcomes}


def test_results_are_read_at_the_end_of_a_run(reproduce: ModuleType, tmp_path: Path) -> None:
    lines = [{"step": step, "loss/total": float(step), "tokens/written_total": 10.0 * step} for step in range(1, 21)]
    lines.append({"step": 20, "evaluation/avg@1": 0.5})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    job = reproduce.Job("variant", 1, tmp_path, [])
    found = {name: reproduce.value(reproduce.lines_of(job), name) for name in ("loss/total", "tokens/written_total",
                                                                                "evaluation/avg@1")}  # fmt: skip
    assert found == {"loss/total": 15.5, "tokens/written_total": 200.0, "evaluation/avg@1": 0.5}
    assert reproduce.value(lines, "loss/total at the start") == 1.0
    assert math.isnan(reproduce.value(lines, "no such metric"))


def test_a_number_at_equal_tokens_lies_between_two_evaluations(reproduce: ModuleType) -> None:
    lines = [{"step": step, "tokens/written_total": 10.0 * step} for step in range(1, 21)]
    lines += [{"step": 10, "evaluation/avg@1": 0.2}, {"step": 20, "evaluation/avg@1": 0.6}]
    found = [
        reproduce.value_at(lines, "evaluation/avg@1", "tokens/written_total", target) for target in (100, 125, 200)
    ]
    assert found == pytest.approx([0.2, 0.3, 0.6])
    assert math.isnan(reproduce.value_at(lines, "evaluation/avg@1", "tokens/written_total", 99.0))


def test_the_interval_is_students(reproduce: ModuleType) -> None:
    mean, half = reproduce.summary([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)  # 0.975 point at 2 degrees of freedom
    assert math.isnan(reproduce.summary([1.0])[1])


def test_a_number_that_a_variant_does_not_have_has_no_interval(reproduce: ModuleType) -> None:
    """Plain OPD has no trigger rate; the table of the others must not fail over it."""
    assert all(map(math.isnan, reproduce.summary([math.nan] * 3)))
    assert "| a | - |" in reproduce.as_markdown({"a": {"x": [math.nan] * 3}}, ["x"], 3)


def test_what_is_measured_besides_is_a_row_with_a_number_per_seed(
    reproduce: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def written(command: list[str], name: str) -> tuple[int, str]:
        commands.append(command)
        out = Path(command[command.index("--out") + 1])
        out.parent.mkdir(parents=True, exist_ok=True)
        seed = float(next(word for word in command if word.startswith("run.seed=")).removeprefix("run.seed="))
        out.write_text(json.dumps({"points": [{"value": 0.5 + seed}, {"value": None}]}))
        return 0, name

    monkeypatch.setattr(reproduce, "RUNS", tmp_path)
    monkeypatch.setattr(reproduce, "run", written)
    measure = {
        "columns": {"accuracy": "value"},
        "commands": [{"run": ["eval", "model"], "rows": {"first": "points/0", "second": "points/1"}}],
    }
    for _ in range(2):  # the second time it reads what the first has written
        table = reproduce.measured(measure, tmp_path / "experiment", [1, 2])
        assert table["first"] == {"accuracy": [1.5, 2.5]}
        assert all(map(math.isnan, table["second"]["accuracy"]))
    assert len(commands) == 2 and commands[0][3:5] == ["eval", "model"]


@pytest.mark.parametrize("folder", EXPERIMENTS, ids=lambda path: path.name)
def test_every_measurement_is_a_command(folder: Path) -> None:
    experiment = yaml.safe_load((folder / "experiment.yaml").read_text())
    for command in experiment.get("measure", {"commands": []})["commands"]:
        args, rest = build_parser(command["run"][0]).parse_known_args([*command["run"], "--out", "file.json"])
        assert args.out == Path("file.json")
        assert all("=" in word and not word.startswith("-") for word in rest)


def test_the_base_model_of_peers_reads_what_peers_show(world: Path) -> None:
    spec = importlib.util.spec_from_file_location("reading", FOLDER / "peer_conditioned" / "reading_data.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tokenizer = load_tokenizer(world / "tokenizer")
    read = module.Reading(world).record({"prompt": "7+5-3=", "answer": "9"}, "contrastive", "1+1=")
    right, wrong = (read["prompt"].split(":\n")[part].split("\n")[0] for part in (1, 2))
    assert right == read["response"] == "7+5=12,12-3=9#9" != wrong
    prompt = replace(make_prompt(0), messages=({"role": "user", "content": "7+5-3="},))
    group = [
        saying(replace(make_rollout(0, 3, sample), prompt=prompt, reward=float(text == right)), text)
        for sample, text in enumerate(("9#9", right, wrong))
    ]
    peers = Peers(PeersContext(successes=1, failures=1), ContextRenderer(tokenizer), seed=0)
    assert peers.context_ids(group)[0] == render_chat(tokenizer, [{"role": "user", "content": read["prompt"]}])
