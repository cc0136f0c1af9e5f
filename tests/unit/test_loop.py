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
from nemo_opd.observe.recorder import Recorder
from nemo_opd.processes import Processes
from nemo_opd.reliability.stop import StopRequest
from nemo_opd.types import StepReport


def _run(folder: Path, steps: int, checkpoint_every: int, evaluate_every: int) -> Any:
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
    recorder = Recorder(folder, 0, rollouts_per_step=0, tensorboard=False)
    return SimpleNamespace(
        **{"config": config, "processes": processes, "stop": stop, "folder": folder, "state": RunState()},
        **{"recorder": recorder, "evaluation": None, "generator": object()},
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
    monkeypatch.setattr(loop, "save", lambda run: happened.append(f"save {run.state.step}"))
    return happened


def _evaluation(run: Any, events: list[str], stopped: bool = False) -> Any:
    """Writes down when it is asked, or is interrupted by a stop request."""

    def measure(generator: Any, processes: Processes, stop: StopRequest) -> Any:
        events.append(f"evaluate {run.state.step}" + (" interrupted" if stopped else ""))
        return None if stopped else SimpleNamespace(metrics=lambda: {"evaluation/avg": 0.5})

    return SimpleNamespace(measure=measure)


def test_the_last_step_is_saved_and_evaluated_whatever_the_intervals(events: list[str], tmp_path: Path) -> None:
    run = _run(tmp_path, steps=5, checkpoint_every=2, evaluate_every=3)
    run.evaluation = _evaluation(run, events)
    assert loop.train(run)
    assert events == ["save 2", "evaluate 3", "save 4", "save 5", "evaluate 5"]


def test_an_evaluation_that_fails_costs_no_trained_step(events: list[str], tmp_path: Path) -> None:
    def fail(*_: Any) -> None:
        raise ConfigError("evaluate.path", "no answers", "answers", "mend it")

    run = _run(tmp_path, steps=3, checkpoint_every=100, evaluate_every=0)
    run.evaluation = SimpleNamespace(measure=fail)
    with pytest.raises(ConfigError):
        loop.train(run)
    assert events == ["save 3"]


@pytest.mark.parametrize(("step", "every"), [(2, 2), (3, 0)], ids=["on the way", "at the end"])
def test_the_next_attempt_does_the_evaluation_that_was_interrupted(
    events: list[str], tmp_path: Path, step: int, every: int
) -> None:
    run = _run(tmp_path, steps=3, checkpoint_every=2, evaluate_every=every)
    run.state.step = step - 1
    run.evaluation = _evaluation(run, events, stopped=True)
    assert not loop.train(run)
    assert events == [f"save {step}", f"evaluate {step} interrupted"]
    run.evaluation = _evaluation(run, events)
    del events[:]
    assert loop.train(run)
    assert events[0] == f"evaluate {step}"
    assert events[-1] == "evaluate 3"
    del events[:]
    assert loop.train(run), "a run that is done has nothing left to do"
    assert events == []
