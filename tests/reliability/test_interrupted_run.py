"""Runs that end in the middle and are started again with the same command.

First `nemo-opd train` as a user has it: two processes, and Ctrl-C. Then a step that goes on to further prompts.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import torch
from safetensors.torch import load_file

from nemo_opd.configuration.load import load
from nemo_opd.types import Prompt, Rollout
from tests.helpers.ranks import RankPool
from tests.helpers.workspace import make_workspace

STEPS = 12


def _command(folder: Path, run_dir: Path) -> list[str]:
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"""
run: {{dir: {run_dir}}}
student: {{model: {folder / "student"}, dtype: float32, tensor_model_parallel_size: 2}}
teacher: {{model: {folder / "teacher"}, dtype: float32, pipeline_model_parallel_size: 2}}
data: {{path: {folder / "train.jsonl"}, max_prompt_tokens: 32}}
rollout: {{max_new_tokens: 24, samples_per_prompt: 4}}
verify: {{name: integer, answer_pattern: "#"}}
evaluate: {{path: {folder / "heldout.jsonl"}}}
optimizer: {{lr: 1.0e-3, decay: cosine}}
train: {{steps: {STEPS}, prompts_per_step: 8, micro_batch_tokens: 128}}
checkpoint: {{every: 5}}
"""
    )
    return [sys.executable, "-m", "nemo_opd.cli", "train", str(recipe)]


def _hear_ctrl_c() -> None:
    """A shell that starts the tests in the background has them ignore it, and what they start would do the same."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=_hear_ctrl_c
    )


@contextmanager
def _standing_still(process: subprocess.Popen[str]) -> Iterator[None]:
    """It and all that it started make no step meanwhile."""
    parent = psutil.Process(process.pid)
    family = [parent, *parent.children(recursive=True)]
    for member in family:
        member.suspend()
    yield
    for member in family:
        member.resume()


def _finish(process: subprocess.Popen[str], timeout: float = 240) -> tuple[int, str]:
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def _steps(run_dir: Path) -> list[int]:
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return [line["step"] for line in lines if "evaluation" not in line]


def _weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "model" / "model.safetensors")


@pytest.mark.slow
def test_interrupted_and_resumed_equals_undisturbed(tmp_path: Path):
    folder = make_workspace(tmp_path)
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    code, output = _finish(_start(_command(folder, undisturbed)))
    assert code == 0, output
    assert _steps(undisturbed) == list(range(1, STEPS + 1))

    first = _start(_command(folder, disturbed))
    deadline = time.monotonic() + 240
    while len(_steps(disturbed)) < 3 and time.monotonic() < deadline and first.poll() is None:
        time.sleep(0.02)
    with _standing_still(first):  # or it may be through all of its steps before the second has imported what it needs
        second = subprocess.run(_command(folder, disturbed), capture_output=True, text=True, check=False)
    assert second.returncode == 2
    assert "in use by process" in second.stderr
    first.send_signal(signal.SIGINT)
    code, output = _finish(first)
    assert code == 75, output
    assert "stopping, with a checkpoint" in output
    outcome = json.loads((disturbed / "outcome.json").read_text())
    assert outcome["status"] == "preempted"
    done = outcome["step"]
    assert 3 <= done < STEPS
    assert (disturbed / "checkpoints" / f"step-{done:08d}" / "state.json").exists()

    code, output = _finish(_start(_command(folder, disturbed)))
    assert code == 0, output
    assert json.loads((disturbed / "outcome.json").read_text())["status"] == "done"
    assert _steps(disturbed) == list(range(1, STEPS + 1))
    ours, theirs = _weights(disturbed), _weights(undisturbed)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name in ("config.yaml", "log.txt", "tensorboard", "rollouts"):
        assert (disturbed / name).exists()
    _check_export_and_evaluation(folder, disturbed)


def _check_export_and_evaluation(folder: Path, run_dir: Path) -> None:
    """A checkpoint written at TP 2 is exported and evaluated by one process, with the weights of the run's end."""
    cli = [sys.executable, "-m", "nemo_opd.cli"]
    code, output = _finish(_start([*cli, "export", str(run_dir), str(folder / "exported")]))
    assert code == 0, output
    exported, end = load_file(folder / "exported" / "model.safetensors"), _weights(run_dir)
    assert exported.keys() == end.keys()
    assert all(torch.equal(exported[name], end[name]) for name in end)
    results = []
    for path in (run_dir, folder / "exported"):
        out = folder / "evaluation.json"
        settings = ["verify.name=integer", "verify.answer_pattern=#", "rollout.max_new_tokens=24"]
        data = ["--data", str(folder / "heldout.jsonl"), "--out", str(out)]
        code, output = _finish(_start([*cli, "eval", str(path), *data, *settings]))
        assert code == 0, output
        results.append(json.loads(out.read_text()))
    assert results[0] == results[1]
    assert results[0]["estimates"][0]["problems"] == 16


KILLED = -1
BREAKS_IN = 3
"""Steps done when the run ends in the second draw of the next one: that of step 2 is the last checkpoint due."""


class _KilledError(Exception):
    """In the place of a process that is no more."""


def _redrawing(folder: Path, run_dir: Path) -> list[str]:
    """An untrained student that is right by luck, in two replicas; prompts that it always fails are replaced."""
    values = {
        **{"algorithm": "rlvr", "run.dir": run_dir, "student.model": folder / "student", "student.dtype": "float32"},
        **{"data.path": folder / "train.jsonl", "data.max_prompt_tokens": 32, "verify.name": "integer"},
        **{"rollout.samples_per_prompt": 16, "rollout.max_new_tokens": 12, "rollout.batch_size": 64},
        **{"reward.equal_groups": "redraw", "reward.redraws": 3, "optimizer.lr": 1e-2, "checkpoint.every": 2},
        **{"train.steps": 5, "train.prompts_per_step": 4, "train.micro_batch_tokens": 512, "observe.progress": "false"},
        "observe.rollouts_per_step": 1000,
    }
    return [f"{name}={value}" for name, value in values.items()]


def _attempt(rank: int, overrides: Sequence[str], breaks: str = "") -> int:
    """Run until the end, or until it `breaks` in a redraw: by a signal to one process, or by the end of both."""
    from nemo_opd import loop, session
    from nemo_opd.engines.megatron.parallel import destroy_student_groups

    destroy_student_groups()
    draws: Counter[int] = Counter()
    write: Callable[..., Iterator[Rollout]] = loop.written

    def written(run: Any, prompts: Sequence[Prompt], *more: Any) -> Iterator[Rollout]:
        draws[run.state.step] += 1
        if breaks and run.state.step == BREAKS_IN and draws[BREAKS_IN] == 2:
            if breaks == "killed":
                raise _KilledError
            if rank == 1:
                signal.raise_signal(signal.SIGTERM)
        yield from write(run, prompts, *more)

    with mock.patch.object(loop, "written", written):
        try:
            return session.run(load(None, overrides))
        except _KilledError:
            return KILLED


def _remembered(run_dir: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """What a run says of its steps, apart from the time they took, and all that it wrote in them."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [{k: v for k, v in line.items() if not k.startswith(("time/", "speed/", "straggler/"))} for line in lines]
    return steps, [path.read_text() for path in sorted((run_dir / "rollouts").glob("step-*.jsonl"))]


@pytest.fixture(scope="module")
def undisturbed(ranks2: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder below the models and data."""
    run_dir = make_workspace(tmp_path_factory.mktemp("redraw")) / "undisturbed"
    assert ranks2.run(_attempt, [*_redrawing(run_dir.parent, run_dir), "checkpoint.every=100"]) == [0, 0]
    return run_dir


@pytest.mark.parametrize(("breaks", "code", "saved"), [("asked", 75, BREAKS_IN), ("killed", KILLED, 2)])
def test_a_run_that_ends_between_two_draws_draws_the_same_again(
    ranks2: RankPool, undisturbed: Path, breaks: str, code: int, saved: int
) -> None:
    disturbed = undisturbed.with_name(breaks)
    overrides = _redrawing(undisturbed.parent, disturbed)
    assert ranks2.run(_attempt, overrides, breaks) == [code, code]
    assert max(path.name for path in (disturbed / "checkpoints").iterdir()) == f"step-{saved:08d}"
    assert ranks2.run(_attempt, overrides) == [0, 0]

    (ours, rollouts), (theirs, others) = map(_remembered, (disturbed, undisturbed))
    assert ours == theirs and rollouts == others
    assert [step["step"] for step in ours] == [1, 2, 3, 4, 5]
    assert all(step["reward/passed_over_groups"] > 0 for step in ours)
    assert sum(step["tokens/trained"] > 0 for step in ours) > 3, "some groups were learnt from"
    ours_end, theirs_end = _weights(disturbed), _weights(undisturbed)
    assert all(torch.equal(ours_end[name], theirs_end[name]) for name in theirs_end)
