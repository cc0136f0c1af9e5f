"""Every smoke recipe trains two steps in one process, on models and data that are made here."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from _pytest.mark import ParameterSet

from tests.helpers.ranks import RankPool
from tests.helpers.servers import START_SECONDS, need_vllm
from tests.helpers.workspace import make_workspace

RECIPES = sorted((Path(__file__).parents[2] / "recipes" / "smoke").glob("*.yaml"))
PLACE = "data/smoke/"
"""Below it stand the files that recipes name."""


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train.jsonl`, `heldout.jsonl`, `student/` and `teacher/`, as `data/smoke/` has them."""
    return make_workspace(tmp_path_factory.mktemp("smoke"), problems=20, head_dim=32)  # which vLLM has kernels for


def moved(values: Mapping[str, Any], files: Path, prefix: str = "") -> Iterator[str]:
    """Overrides that put `files` in the place of `data/smoke/`."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from moved(value, files, f"{prefix}{name}.")
        elif isinstance(value, str) and value.startswith(PLACE):
            yield f"{prefix}{name}={files / value.removeprefix(PLACE)}"


def train(rank: int, recipe: Path, overrides: list[str]) -> int:
    from nemo_opd import session
    from nemo_opd.configuration.load import load
    from nemo_opd.engines.megatron.parallel import destroy_student_groups

    destroy_student_groups()
    return session.run(load(recipe, overrides))


def parameters() -> Iterator[ParameterSet]:
    """Recipes; those that start servers are slow."""
    for path in RECIPES:
        yield pytest.param(path, id=path.stem, marks=pytest.mark.slow if starts_servers(path) else ())


def starts_servers(recipe: Path) -> bool:
    return "engine: vllm" in recipe.read_text()


@pytest.mark.parametrize("recipe", parameters())
def test_two_steps(recipe: Path, files: Path, tmp_path: Path, ranks1: RankPool) -> None:
    text = recipe.read_text()
    assert text.count("\n") <= 40
    overrides = [*moved(yaml.safe_load(text), files), f"run.dir={tmp_path}", "observe.progress=false", "train.steps=2"]
    if starts_servers(recipe):
        need_vllm()
    assert ranks1.run(train, recipe, overrides, timeout=START_SECONDS) == [0]
    reports = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [report for report in reports if "loss/total" in report]
    assert [report["step"] for report in steps] == [1, 2]
    for report in steps:
        assert math.isfinite(report["loss/total"]) and report["optimizer/skipped"] == 0
        assert report["tokens/trained"] > 0 and report["optimizer/grad_norm"] > 0
