"""Whole runs of two processes in which one rank hangs: `nemo-opd train` names rank and section, and leaves nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from nemo_opd.reliability.outcome import Status, read_outcome
from tests.helpers.figures import record
from tests.helpers.workspace import make_workspace

LIMIT = 6.0
SLACK = 1.0 + 0.25
STARTING = 300.0


def _processes_of(run_dir: Path) -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            if any(str(run_dir) in part for part in process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("hangs"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "section", "words"),
    [
        ("step.rollout=freeze@3 rank=1", "rollout", "it is stopped by a signal"),
        ("step.score=sleep:600@3 rank=1", "score", "it runs, and waits for no other rank, last seen in faults.py:"),
        ("step.score=hold:600@3 rank=1", "score", "a call holds the interpreter's lock"),
    ],
    ids=["stopped", "deadlock when the teacher is asked", "interpreter locked"],
)
def test_a_hang_is_named(folder: Path, fault: str, section: str, words: str) -> None:
    run_dir = folder / section / re.sub(r"\W", "-", fault)
    settings = {
        **{"run.dir": run_dir, "student.model": folder / "student", "teacher.model": folder / "teacher"},
        **{"data.path": folder / "train.jsonl", "student.dtype": "float32", "teacher.dtype": "float32"},
        **{"data.max_prompt_tokens": 32, "rollout.max_new_tokens": 12, "train.prompts_per_step": 4},
        **{"train.micro_batch_tokens": 64, "train.steps": 50, "train.processes": 2, "run.restarts": 0},
        **{"student.tensor_model_parallel_size": 2, "limits.rollout": LIMIT, "limits.score": LIMIT},
    }
    recipe = run_dir.with_suffix(".yaml")
    recipe.parent.mkdir(exist_ok=True)
    recipe.write_text("{}")
    command = [sys.executable, "-m", "nemo_opd.cli", "train", str(recipe)]
    command += [f"{name}={value}" for name, value in settings.items()]
    environment = {**os.environ, "NEMO_OPD_FAULTS": fault}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=STARTING, check=False)
    ended = time.time()
    outcome = read_outcome(run_dir)
    assert outcome is not None, done.stderr
    assert (outcome.status, outcome.rank) == (Status.FAILED, 1), outcome.reason
    age = re.search(rf"hangs: ([\d.]+) s in section {section}, limits.{section} is {LIMIT:g} s", outcome.reason)
    assert age is not None and words in outcome.reason, outcome.reason
    assert LIMIT <= float(age[1]) <= LIMIT + SLACK
    assert done.returncode == 70
    assert "error: rank 1: rank 1 on " in done.stderr
    written = (run_dir / "outcome.json").stat().st_mtime
    assert ended - written < 10, "and then the launcher ends"
    assert _processes_of(run_dir) == []
    record("R9", f"{fault}: rank and section named, seconds beyond the limit", f"{float(age[1]) - LIMIT:.1f}")
