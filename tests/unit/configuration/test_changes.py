"""What may change between two attempts at a run, and what is refused."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from nemo_opd.config import Config
from nemo_opd.configuration.changes import ANOTHER_RUN, check_changes
from nemo_opd.configuration.load import load, recorded_yaml
from nemo_opd.errors import ConfigError

BASE = ("run.dir=a", "student.model=s", "teacher.model=t", "data.path=d", "train.steps=10")


def recipe(*overrides: str) -> Config:
    return load(None, [*BASE, *overrides], checked=False)


def compare(tmp_path: Path, before: Config, now: Config) -> None:
    (tmp_path / "config.yaml").write_text(recorded_yaml(before))
    check_changes(tmp_path / "config.yaml", 7, now)


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.steps=20", "optimizer.lr=0.5", "optimizer.decay=cosine"),
        ("checkpoint.every=3", "observe.progress=false", "evaluate.every=2"),
        ("student.tensor_model_parallel_size=2", "teacher.pipeline_model_parallel_size=2", "train.processes=4"),
        ("student.model=elsewhere/s", "teacher.model=elsewhere/t", "data.path=elsewhere/d"),
        ("rollout.temperature=0.7", "train.prompts_per_step=8"),
    ],
    ids=["length and rate", "intervals", "layout", "places", "sampling"],
)
def test_what_may_change_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture, overrides: tuple[str, ...]) -> None:
    with caplog.at_level(logging.INFO):
        compare(tmp_path, recipe(), recipe(*overrides))
    [said] = [record for record in caplog.records if "changed since step 7" in record.getMessage()]
    assert all(word.partition("=")[0] in said.getMessage() for word in overrides)
    assert said.levelno == logging.INFO


def test_an_equal_recipe_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        compare(tmp_path, recipe("run.dir=before", "optimizer.lr=1e-6"), recipe("run.accept_changes=true"))
    assert not caplog.records


@pytest.mark.parametrize(
    ("override", "key", "was"),
    [
        ("run.seed=1", "run.seed", "0"),
        ("data.shuffle=false", "data.shuffle", "True"),
        ("data.prompt_key=question", "data.prompt_key", "prompt"),
        ("data.template_arguments.enable_thinking=false", "data.template_arguments.enable_thinking", "nothing"),
        ("student.dtype=float32", "student.dtype", "bfloat16"),
        ("loss=tail", "loss.name", "reverse_kl"),
        ("stop=kat", "stop.name", "default"),
        ("algorithm=gkd", "prefix.name", "student"),
        ("teacher.source=ema", "teacher.source", "external"),
        ("teachers.math.source=ema", "teachers.math.source", "nothing"),
    ],
)
def test_another_run_is_refused_by_the_key_that_makes_it_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, override: str, key: str, was: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        compare(tmp_path, recipe(), recipe(override, "train.steps=20"))
    assert key in refused.value.key.split(", ")
    assert was in refused.value.expected and "step 7" in refused.value.expected
    assert "train.steps" not in str(refused.value)
    with caplog.at_level(logging.INFO):
        compare(tmp_path, recipe(), recipe(override, "run.accept_changes=true"))
    assert any(key in record.getMessage() and record.levelno == logging.WARNING for record in caplog.records)


def test_a_schema_that_has_grown_is_no_change(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = recorded_yaml(recipe())
    (tmp_path / "config.yaml").write_text(text.replace("accept_changes: false", "gone: 1").replace("  keep: 2\n", ""))
    with caplog.at_level(logging.INFO):
        check_changes(tmp_path / "config.yaml", 7, recipe())
    assert not caplog.records


def test_every_key_that_makes_another_run_is_one() -> None:
    text = recorded_yaml(recipe("data.template_arguments.x=1", "teachers.a.source=ema"))
    for pattern in ANOTHER_RUN:
        last = pattern.rstrip("*").rpartition(".")[2]
        assert f"{last}:" in text, pattern
