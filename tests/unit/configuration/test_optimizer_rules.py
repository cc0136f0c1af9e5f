"""What is refused of `optimizer.overlap_param_gather` before a model loads."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from nemo_opd.configuration.load import load
from nemo_opd.errors import ConfigError
from tests.unit.configuration.workspace import make_workspace

GATHER = "optimizer.overlap_param_gather=true"
SELF = ("teacher.model=null", "context=privileged", "context.text=a rule", "context.max_tokens=64")


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return make_workspace(tmp_path)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([], "false with rollout.refit_every=1, where the generator takes all parameters right after the update;"),
        (["rollout.refit_every=2", "optimizer.distributed=false"], "false without the distributed optimizer, as each"),
        (
            ["rollout.refit_every=2", "student.fp8.recipe=blockwise", "student.fp8.param_gather=true"],
            "false beside student.fp8.param_gather;",
        ),
        (
            ["rollout.refit_every=2", *SELF, "teacher.source=ema"],
            "false with teacher.source=ema, which takes all parameters right after the update;",
        ),
        (["rollout.refit_every=2", *SELF, "teacher.source=current"], "false with teacher.source=current, which takes"),
    ],
)
def test_where_it_would_gain_nothing_or_was_never_tried(recipe: Path, settings: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load(recipe, [GATHER, *settings])
    assert str(refused.value).startswith(f"optimizer.overlap_param_gather: got True; expected {expected}")


@pytest.mark.parametrize(
    "settings",
    [
        ["rollout.refit_every=2"],
        ["prefix=dataset", "loss=cross_entropy", "teacher.engine=none", "teacher.model=null"],
        ["prefix=mixed", "prefix.on_policy_share=0"],
        ["rollout.refit_every=2", *SELF, "teacher.source=frozen"],
    ],
    ids=["steps between two refits", "the data set writes", "the data set writes all the same", "a frozen teacher"],
)
def test_where_it_can_gain_something_only_the_machine_is_asked(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, settings: list[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())  # asked of Transformer Engine alone
    assert load(recipe, [GATHER, *settings]).optimizer.overlap_param_gather
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="the distributed optimizer needs Transformer Engine, which is not"):
        load(recipe, [GATHER, *settings])
