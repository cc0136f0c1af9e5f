"""`nemo-opd train` as a user has it: two processes, Ctrl-C in the middle, the same command again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.workspace import make_workspace

STEPS = 40


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


def _start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ.copy())


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
    while not disturbed.exists() and time.monotonic() < deadline and first.poll() is None:
        time.sleep(0.02)
    time.sleep(1.0)  # the folder is there a moment before its lock is held
    # While the first imports what it needs, which takes longer than a refusal: later it might end before the signal.
    second = subprocess.run(_command(folder, disturbed), capture_output=True, text=True, check=False)
    assert second.returncode == 2
    assert "in use by process" in second.stderr
    while len(_steps(disturbed)) < 3 and time.monotonic() < deadline and first.poll() is None:
        time.sleep(0.02)
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
