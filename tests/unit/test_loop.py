"""The order of what surrounds a step."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_opd import loop
from nemo_opd.checkpoint.store import CheckpointStore, RunState, newest_checkpoint, read_state
from nemo_opd.config import CheckpointConfig, Config, DataConfig, EvaluateConfig, ObserveConfig, RunConfig, TrainConfig
from nemo_opd.diagnosis.diagnosis import Diagnosis
from nemo_opd.errors import ConfigError
from nemo_opd.observe.recorder import Recorder
from nemo_opd.processes import Processes
from nemo_opd.reliability.guard import Guard
from nemo_opd.reliability.heartbeat import Silent
from nemo_opd.reliability.stop import StopRequest
from nemo_opd.types import StepReport
from tests.helpers.checkpoints import FileTrainer
from tests.helpers.histories import FAILS_FROM, FAILURES, Metrics, healthy


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
    state = RunState()
    return SimpleNamespace(
        **{"config": config, "processes": processes, "stop": stop, "folder": folder, "state": state},
        **{"recorder": recorder, "evaluation": None, "generator": object()},
        **{"ahead": SimpleNamespace(close=lambda: None, finished_more=lambda step: False, kept=lambda step: b"")},
        **{"source": SimpleNamespace(follows_policy=True)},
        **{"store": SimpleNamespace(poll=lambda: None, wait=lambda: None)},
        **{"diagnosis": Diagnosis(config.diagnose, state.diagnosis), "diagnosed": ""},
        **{"guard": Guard(config.guard, state.guard, processes), "heartbeat": Silent()},
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


def _metrics(step: int, collapse: bool) -> Metrics:
    metrics = healthy(step)(step)
    return metrics | (FAILURES["repetition"](1.0, metrics) if collapse and step >= FAILS_FROM else {})


def _stored(run: Any, folder: Path) -> Any:
    """The run with a real checkpoint store, around a trainer without weights."""
    run.store, run.trainer = CheckpointStore(folder, run.processes, 2), FileTrainer()
    run.config_text, run.stateful = "a recipe", {}
    return run


def _said(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "diagnosis.jsonl").read_text().splitlines()]


@pytest.fixture
def collapsing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of a run that collapses into repetition."""

    def one_step(run: Any) -> StepReport:
        run.state.step += 1
        return StepReport(run.state.step, run.state.step, _metrics(run.state.step, collapse=True), 0.0)

    monkeypatch.setattr(loop, "refit_generator", lambda run: None)
    monkeypatch.setattr(loop, "one_step", one_step)


def test_a_collapse_into_repetition_saves_and_stops_with_its_reason(collapsing: None, tmp_path: Path) -> None:
    run = _stored(_run(tmp_path, steps=1000, checkpoint_every=500, evaluate_every=0), tmp_path)
    assert not loop.train(run)
    step = run.state.step
    assert FAILS_FROM < step < FAILS_FROM + 25
    assert run.diagnosed.startswith(f"repetition since step {step}: ")
    assert newest_checkpoint(tmp_path / "checkpoints") == tmp_path / "checkpoints" / f"step-{step:08d}"
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["diagnosis/repetition"] for line in lines[-2:]] == [0.0, 1.0]
    last = _said(tmp_path)[-1]
    assert (last["sign"], last["step"], last["action"]) == ("repetition", step, "stop")


def test_a_resumed_run_keeps_its_windows_and_ends_the_same_way_unless_told_otherwise(
    collapsing: None, tmp_path: Path
) -> None:
    run = _stored(_run(tmp_path, steps=1000, checkpoint_every=500, evaluate_every=0), tmp_path)
    loop.train(run)
    stopped_at = run.state.step
    for stop, steps in ((True, stopped_at + 1), (False, stopped_at + 30)):
        again = _stored(_run(tmp_path, steps=stopped_at + 30, checkpoint_every=500, evaluate_every=0), tmp_path)
        again.config.diagnose.stop = stop
        newest = newest_checkpoint(tmp_path / "checkpoints")
        assert newest is not None
        again.state = read_state(newest)
        again.diagnosis = Diagnosis(again.config.diagnose, again.state.diagnosis)
        assert loop.train(again) is not stop
        assert again.state.step == steps
        assert bool(again.diagnosed) is stop
        if stop:
            last = _said(tmp_path)[-1]
            assert (last["sign"], last["step"], last["since"]) == ("repetition", stopped_at + 1, stopped_at)


def test_a_sign_at_the_last_step_ends_nothing(collapsing: None, tmp_path: Path) -> None:
    run = _stored(_run(tmp_path, steps=1000, checkpoint_every=500, evaluate_every=0), tmp_path)
    loop.train(run)
    (tmp_path / "exact").mkdir()
    exact = _stored(_run(tmp_path / "exact", steps=run.state.step, checkpoint_every=500, evaluate_every=0), tmp_path)
    assert loop.train(exact)
    assert exact.diagnosed == ""


def test_asynchronous_saves_are_all_there_at_the_end(collapsing: None, tmp_path: Path) -> None:
    for steps in (10, 11):
        (folder := tmp_path / f"{steps}").mkdir()
        run = _stored(_run(folder, steps=steps, checkpoint_every=5, evaluate_every=0), folder)
        run.config.checkpoint.asynchronous = True
        assert loop.train(run)
        saved = sorted(path.name for path in (folder / "checkpoints").iterdir())
        assert saved == [f"step-{step:08d}" for step in sorted({5, 10, steps})[-2:]]
