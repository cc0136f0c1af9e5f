"""The order of what surrounds a step."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_opd import loop
from nemo_opd.checkpoint.store import RunState
from nemo_opd.config import CheckpointConfig, Config, DataConfig, EvaluateConfig, ObserveConfig, RunConfig, TrainConfig
from nemo_opd.errors import ConfigError
from nemo_opd.processes import Processes
from nemo_opd.reliability.stop import StopRequest
from nemo_opd.types import StepReport


def _run(steps: int, checkpoint_every: int, evaluate_every: int) -> Any:
    config = Config(
        run=RunConfig(dir="unused"),
        data=DataConfig(path="unused"),
        train=TrainConfig(steps=steps),
        checkpoint=CheckpointConfig(every=checkpoint_every),
        evaluate=EvaluateConfig(every=evaluate_every),
        observe=ObserveConfig(progress=False),
    )
    processes = Processes()
    stop = StopRequest(None, "test", processes)
    return SimpleNamespace(
        config=config, processes=processes, stop=stop, folder=Path("unused"), state=RunState(), recorder=None
    )


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the loop did, in order; its parts are of no interest here."""
    happened: list[str] = []

    def one_step(run: Any) -> StepReport:
        run.state.step += 1
        return StepReport(run.state.step, run.state.step, {}, 0.0)

    monkeypatch.setattr(loop, "refit_generator", lambda run: None)
    monkeypatch.setattr(loop, "one_step", one_step)
    for name in ("save", "evaluate"):
        monkeypatch.setattr(loop, name, lambda run, name=name: happened.append(f"{name} {run.state.step}"))
    return happened


def test_the_last_step_is_saved_and_evaluated_whatever_the_intervals(events: list[str]) -> None:
    assert loop.train(_run(steps=5, checkpoint_every=2, evaluate_every=3))
    assert events == ["save 2", "evaluate 3", "save 4", "save 5", "evaluate 5"]


def test_an_evaluation_that_fails_costs_no_trained_step(events: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(run: Any) -> None:
        raise ConfigError("evaluate.path", "no answers", "answers", "mend it")

    monkeypatch.setattr(loop, "evaluate", fail)
    with pytest.raises(ConfigError):
        loop.train(_run(steps=3, checkpoint_every=100, evaluate_every=0))
    assert events == ["save 3"]
