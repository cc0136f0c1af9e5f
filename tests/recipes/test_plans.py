"""Recipes of real pairs: short, complete, and each fits by its plan; the pages that show plans show these."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_opd.planning.catalogue import FOLDER
from nemo_opd.planning.plan import Options, make_setting, plan, read_recipe
from nemo_opd.planning.recipes_table import SEEN, recipes, table, with_table

ROOT = Path(__file__).parents[2]
PLANNED = [path for path in recipes(ROOT / "recipes") if path.parent.name not in SEEN]
PUBLIC = {"dapo_math_17k": "DAPO-Math-17k", "openthoughts": "OpenThoughts", "gsm8k": "GSM8K"}


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def test_the_pairs_that_are_promised_are_there() -> None:
    assert {name(path) for path in PLANNED} == {
        "qwen3-1.7b_from_qwen3-32b/1_node",
        "qwen3-1.7b_from_qwen3-32b/1_node_fp8",
        "qwen3-8b_from_qwen3-32b/2_nodes",
        "qwen3-8b_from_qwen3-32b/8_nodes",
        "qwen3-8b_from_qwen3-32b/8_nodes_fp8",
        "llama-3.2-3b_from_llama-3.3-70b/4_nodes",
        "qwen3-30b-a3b_from_qwen3-32b/8_nodes",
        "qwen3-8b_from_qwen3-235b-a22b/served_teacher",
        "qwen3-8b_system_prompt/opsd",
        "papers/topk_stop_gradient",
        "papers/trust_region",
        "papers/peer_conditioned",
        "papers/kat",
    }


@pytest.mark.parametrize("path", PLANNED, ids=name)
def test_a_recipe_is_short_and_says_where_its_data_come_from(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 40
    data = Path(yaml.safe_load(text)["data"]["path"])
    (line,) = [line for line in text.splitlines() if line.startswith(f"# {data}: ")]
    assert PUBLIC[data.stem] in line
    assert '{"prompt": "...", "answer": "' in line


@pytest.mark.parametrize("path", PLANNED, ids=name)
def test_a_recipe_fits_and_uses_the_nodes_of_its_name(path: Path) -> None:
    found = plan(make_setting(read_recipe(path, ()), Options()))
    assert found.problems == []
    if path.stem.removesuffix("_fp8").endswith(("_node", "_nodes")):
        assert found.setting.nodes == int(path.stem.partition("_")[0])
    assert found.worst.peak[1] < 0.9 * found.setting.cluster.gpu.memory, "room for what a plan does not know"


def put_in_place(path: Path) -> None:
    """What a recipe refers to, in this folder: models of their config.json alone, one record."""
    values = yaml.safe_load(path.read_text())
    for section in ("student", "teacher"):
        model = values.get(section, {}).get("model")
        if model:
            published = Path(model).name.removesuffix("-Base").removesuffix("-Instruct")
            Path(model).mkdir(parents=True)
            shutil.copy(FOLDER / f"{published}.json", Path(model) / "config.json")
    Path("data").mkdir()
    Path(values["data"]["path"]).write_text('{"prompt": "1+1", "answer": "2"}\n')


def built(paths: list[Path]) -> list[str]:
    from nemo_opd.planning.command import build_ranks

    return [build_ranks(plan(make_setting(read_recipe(path, ()), Options()))) for path in paths]


def test_every_rank_of_every_recipe_is_built_as_planned(alone: Callable[..., Any]) -> None:
    found = alone(built, PLANNED)
    assert len(found) == len(PLANNED)
    assert all("as calculated" in line for line in found)


@pytest.mark.parametrize("path", PLANNED, ids=name)
def test_with_models_and_data_in_place_the_run_itself_takes_the_recipe(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of a run's own checks, with config.json files for models."""
    from nemo_opd.configuration.load import load

    monkeypatch.chdir(tmp_path)
    put_in_place(path)
    for variable in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)
    assert load(path).student.model == yaml.safe_load(path.read_text())["student"]["model"]


def test_the_table_of_recipes_is_up_to_date() -> None:
    text = (ROOT / "recipes" / "README.md").read_text()
    assert with_table(text, table(ROOT / "recipes")) == text, "run python -m nemo_opd.planning.recipes_table"


def test_the_page_about_scaling_has_the_tables_of_the_plan() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scaling", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), "run python -m benchmarks.scaling --write"


def test_a_table_needs_its_marks() -> None:
    with pytest.raises(ValueError, match="expected both"):
        with_table("no marks", "| a |\n")
