"""R1 and R5 of docs/recovery.md: a run of two ranks is killed with SIGKILL, again and again, and started again.

Whatever the moment, it goes on from the last checkpoint that was committed, and at the end it has the weights, and has
trained on the prompts, of a run that nobody disturbed.
"""

from __future__ import annotations

import hashlib
import json
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from unittest import mock

import psutil
import pytest

from nemo_opd.configuration.load import to_yaml
from nemo_opd.reliability import faults
from tests.helpers.figures import record, trials
from tests.helpers.forks import Group, Say
from tests.helpers.workspace import make_workspace, workspace_config


def _train(rank: int, say: Say, folder: str, run_dir: str, overrides: tuple[str, ...], fault: str = "") -> None:
    """Start or resume, train to the end, and tell of every save and of the last weights. From the second save of this
    attempt on it breaks by the rules of `fault`."""
    from nemo_opd import loop
    from nemo_opd.assemble import assemble
    from nemo_opd.processes import Processes
    from nemo_opd.reliability import faults
    from nemo_opd.reliability.stop import StopRequest

    Path(run_dir).mkdir(exist_ok=True)
    config = workspace_config(Path(folder), *overrides, run_dir=Path(run_dir))
    processes = Processes.current()
    run = assemble(config, processes, StopRequest(Path(run_dir), "test", processes))
    say(("resumed", run.state.step))
    save = loop.save

    def telling(run: loop.Run) -> None:
        if run.state.step == run.started_at + 2:
            faults.arm(fault)
        say(("saving", run.state.step))
        save(run)
        say(("saved", run.state.step))

    with mock.patch.object(loop, "save", telling):
        assert loop.train(run)
    weights = hashlib.sha256()
    for name, tensor in run.trainer.export_weights():
        weights.update(name.encode() + tensor.contiguous().numpy().tobytes())
    say(("weights", weights.hexdigest()))


def _settings(steps: int, *more: str) -> tuple[str, ...]:
    layout = ("student.tensor_model_parallel_size=2", "teacher.pipeline_model_parallel_size=2")
    quiet = ("observe.tensorboard=false", "observe.rollouts_per_step=100", "evaluate.path=null")
    return (*layout, *quiet, "checkpoint.every=1", f"train.steps={steps}", *more)


def _to_the_end(folder: Path, run_dir: Path, settings: tuple[str, ...]) -> str:
    """The hash of the weights at the end of a run that is left alone from now on."""
    with Group(_train, (str(folder), str(run_dir), settings), folder) as group:
        group.drain()
        kind, weights = group.said[-2]
        assert kind == "weights", group.said[-3:]
        return str(weights)


def _trained_prompts(run_dir: Path) -> Counter[tuple[int, int]]:
    """(epoch, index) of every rollout that was trained on; a step that was made twice has written its file twice."""
    found: Counter[tuple[int, int]] = Counter()
    for path in sorted((run_dir / "rollouts").glob("step-*.jsonl")):
        for line in path.read_text().splitlines():
            rollout = json.loads(line)
            found[rollout["epoch"], rollout["index"]] += 1
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 problems, so an epoch has 6 steps."""
    return make_workspace(tmp_path_factory.mktemp("kills"), problems=24)


@pytest.fixture(scope="module")
def seconds_of_a_save(folder: Path) -> float:
    """Of one that is not the first of its process, on this machine at this time."""
    begun: dict[int, float] = {}
    found = []
    with Group(_train, (str(folder), str(folder / "timed"), _settings(5)), folder) as group:
        while (said := group.next()) is not None:
            if said[0] == "saving":
                begun[said[1]] = time.monotonic()
            elif said[0] == "saved" and said[1] > 1:
                found.append(time.monotonic() - begun[said[1]])
    return statistics.median(found)


@pytest.mark.slow
def test_a_kill_while_saving_costs_no_committed_step(folder: Path, seconds_of_a_save: float) -> None:
    count, draws = trials(200, 6), random.Random(0)
    run_dir, settings = folder / "saving", _settings(2 * count + 10)
    committed, unloadable, lost = 0, 0, 0
    for _ in range(count):
        with Group(_train, (str(folder), str(run_dir), settings), folder) as group:
            kind, resumed = group.next()
            unloadable += kind != "resumed" or resumed < committed
            while group.next() != ("saving", resumed + 2):  # the first of a process is slow, and is left alone
                assert group.said[-1] is not None
            time.sleep(draws.uniform(0, 1.3 * seconds_of_a_save))
            group.kill()
            group.drain()
            committed = max(step for kind, step in group.said[1:] if kind == "saved")
            lost = max(lost, max(step for kind, step in group.said if kind == "saving") - committed)
    assert unloadable == 0
    assert lost <= 1, "a save each step"
    record("R1", "newest checkpoint not loadable after kill -9 while it was saved", f"{unloadable} / {count}")
    record("R1", "steps lost at most, saving each step", str(lost))


POINTS = sorted(point for point in faults.POINTS if point.startswith("ckpt.") and point != "ckpt.replacing")
"""Of a save. A checkpoint is replaced where a run went back and saves a step again: see test_commit.py."""


@pytest.mark.slow
def test_a_kill_at_any_point_of_a_save_costs_no_committed_step(folder: Path) -> None:
    """All ranks at once, and one of them while the others wait for it."""
    whose = trials(2, 1)
    count = len(POINTS) * whose
    run_dir, settings = folder / "points", _settings(60)
    committed, unloadable = 0, 0
    for number, point in enumerate([point for point in POINTS for _ in range(whose)]):
        fault = f"{point}=kill" + (" rank=1" if number % whose and "shard" in point else "")
        with Group(_train, (str(folder), str(run_dir), settings, fault), folder) as group:
            kind, resumed = group.next()
            unloadable += kind != "resumed" or resumed < committed
            group.wait_for_a_death()
            group.kill()
            group.drain()
            committed = max(step for kind, step in group.said[1:] if kind == "saved")
            assert committed < 60, f"{point} was never come by"
    assert unloadable == 0
    assert _to_the_end(folder, run_dir, settings) == _to_the_end(folder, folder / "no points", settings)
    record("R1", f"the same after a kill at each of {len(POINTS)} named points", f"{unloadable} / {count}")


@pytest.mark.slow
def test_no_prompt_is_lost_or_repeated_however_often_the_run_is_killed(folder: Path) -> None:
    """Three epochs. Besides the random moments, once when the last step of an epoch is saved, and once just before."""
    count, draws = trials(10, 2), random.Random(1)
    calm, run_dir, settings = folder / "calm", folder / "epochs", _settings(18)
    expected = _to_the_end(folder, calm, settings)
    arguments = (str(folder), str(run_dir), settings)
    for moment in [("saving", 6), ("saved", 6), *draws.choices(range(1000), k=count)]:
        with Group(_train, arguments, folder) as group:
            if isinstance(moment, tuple):
                while group.next() not in (moment, None):
                    pass
            else:
                group.next()
                time.sleep(moment / 400)  # up to 2.5 seconds after it has resumed
    assert _to_the_end(folder, run_dir, settings) == expected
    found, undisturbed = _trained_prompts(run_dir), _trained_prompts(calm)
    assert set(undisturbed) == {(epoch, index) for epoch in range(3) for index in range(24)}
    assert found == undisturbed, "each as often as it has samples"
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 19))
    record("R5", f"prompts lost, prompts repeated; kills over 3 epochs: {count + 2}", "0, 0")
    record("R5", "steps trained of steps requested", f"{len(steps)} / 18")


def _kill_family(process: subprocess.Popen[bytes]) -> None:
    """Launcher, torchrun and ranks, at once, as a node that loses power does."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    _, alive = psutil.wait_procs(family, 20)
    assert alive == []


@pytest.mark.slow
def test_a_run_that_is_killed_as_a_whole_goes_on(folder: Path) -> None:
    """The command of a user, under torchrun, at random moments from its start on."""
    count, draws, steps = trials(5, 1), random.Random(2), 18
    run_dir, settings = folder / "whole", _settings(steps)
    config = workspace_config(folder, *settings, run_dir=run_dir)
    recipe = folder / "whole.yaml"
    recipe.write_text(to_yaml(config))
    command = [sys.executable, "-m", "nemo_opd.cli", "train", str(recipe)]
    committed = []
    for _ in range(count):
        with (folder / "whole.txt").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        begun = _newest(run_dir)
        while _newest(run_dir) == begun and process.poll() is None:
            time.sleep(0.05)
        time.sleep(draws.uniform(0, 1.0))
        _kill_family(process)
        committed.append(_newest(run_dir))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert committed == sorted(committed)
    assert _to_the_end(folder, run_dir, settings) == _to_the_end(folder, folder / "calm", settings)
    assert _trained_prompts(run_dir) == _trained_prompts(folder / "calm")
    record("R1", "whole runs (launcher, torchrun, ranks) killed at random moments that did not go on", f"0 / {count}")


def _newest(run_dir: Path) -> str:
    """Name of the newest committed checkpoint."""
    return max((path.name for path in (run_dir / "checkpoints").glob("step-*")), default="")
