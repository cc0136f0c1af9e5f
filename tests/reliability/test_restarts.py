"""A rank is killed in the middle of a run, which is started again: the same weights as if nothing had been."""

from __future__ import annotations

import hashlib
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from nemo_opd.launch import child_environment, torchrun_command
from nemo_opd.reliability.heartbeat import beat_file, read_beat
from nemo_opd.reliability.outcome import Status, read_outcome
from tests.helpers.figures import record
from tests.helpers.workspace import make_workspace

STEPS = 13
KILLED_AT = (3, 7, 12)
DEADLINE = 400.0


def _settings(folder: Path, run_dir: Path) -> list[str]:
    values = {
        **{"run.dir": run_dir, "student.model": folder / "student", "teacher.model": folder / "teacher"},
        **{"data.path": folder / "train.jsonl", "student.dtype": "float32", "teacher.dtype": "float32"},
        **{"data.max_prompt_tokens": 32, "rollout.max_new_tokens": 12, "rollout.samples_per_prompt": 2},
        **{"train.prompts_per_step": 4, "train.micro_batch_tokens": 64, "train.steps": STEPS, "train.processes": 2},
        **{"optimizer.lr": 1e-3, "checkpoint.every": 2, "run.restarts": 1, "observe.tensorboard": "false"},
    }
    return [f"{name}={value}" for name, value in values.items()]


def _hash(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / "model" / "model.safetensors").read_bytes()).hexdigest()


def _steps(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def _train(folder: Path, run_dir: Path) -> list[str]:
    recipe = folder / "recipe.yaml"
    recipe.write_text("{}")
    return [sys.executable, "-m", "nemo_opd.cli", "train", str(recipe), *_settings(folder, run_dir)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("restarts"))


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> str:
    done = subprocess.run(
        _train(folder, folder / "calm"), capture_output=True, text=True, timeout=DEADLINE, check=False
    )
    assert done.returncode == 0, done.stderr
    return _hash(folder / "calm")


def _kill_at(process: subprocess.Popen[str], run_dir: Path, steps: Sequence[int]) -> list[float]:
    """SIGKILL to rank 1 when so many steps are written down; seconds from each kill to the next new step."""
    recovered = []
    for step in steps:
        _until(process, lambda step=step: _steps(run_dir) >= step)
        beat = read_beat(beat_file(run_dir, 1))
        assert beat is not None
        done, killed = _steps(run_dir), time.monotonic()
        os.kill(beat.pid, signal.SIGKILL)
        _until(process, lambda pid=beat.pid: (beat := read_beat(beat_file(run_dir, 1))) is not None and beat.pid != pid)
        _until(process, lambda done=done: _steps(run_dir) > done)
        recovered.append(time.monotonic() - killed)
    return recovered


def _until(process: subprocess.Popen[str], condition) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.slow
def test_a_rank_that_is_killed_three_times_changes_no_bit(folder: Path, undisturbed: str) -> None:
    run_dir = folder / "killed"
    process = subprocess.Popen(
        _train(folder, run_dir), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        recovered = _kill_at(process, run_dir, KILLED_AT)
        output, _ = process.communicate(timeout=DEADLINE)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
    assert process.returncode == 0, output
    assert output.count("starting again from step ") == len(KILLED_AT)
    outcome = read_outcome(run_dir)
    assert outcome is not None and (outcome.status, outcome.step) == (Status.DONE, STEPS)
    assert _hash(run_dir) == undisturbed
    record("R10", "weights that differ after kill -9 of a rank at steps 3, 7 and 12", "none")
    record("R10", "seconds from the kill to the next new step, median", f"{statistics.median(recovered):.1f}")


@pytest.mark.slow
def test_torchrun_starts_the_ranks_again_and_changes_no_bit(folder: Path, undisturbed: str) -> None:
    """What a cluster has: every rank the same command, restarts by torchrun."""
    run_dir = folder / "torchrun"
    program = ["-m", "nemo_opd.cli", "train", str(folder / "recipe.yaml"), *_settings(folder, run_dir)]
    command = torchrun_command(2, "a", folder / "logs", program)
    command.insert(command.index("--nnodes"), "--max-restarts=1")
    environment = {**child_environment(2, "a"), "NEMO_OPD_FAULTS": "step.trained=kill@12 rank=1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert done.returncode == 0, done.stderr
    outcome = read_outcome(run_dir)
    assert outcome is not None and (outcome.status, outcome.step) == (Status.DONE, STEPS)
    assert _hash(run_dir) == undisturbed
