"""A run whose rollouts vLLM writes, stopped in the middle and started again, ends with the weights of one that the `hf`
generator wrote without a stop: with a divergence over the whole vocabulary only the tokens matter."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.servers import need_vllm
from tests.helpers.workspace import make_workspace

pytestmark = pytest.mark.slow

STEPS = 8


def command(folder: Path, engine: str) -> list[str]:
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"""
student: {{model: {folder / "student"}, dtype: float32}}
teacher: {{model: {folder / "teacher"}, dtype: float32}}
data: {{path: {folder / "train.jsonl"}, max_prompt_tokens: 32}}
rollout: {{dtype: float32, max_new_tokens: 24, samples_per_prompt: 4}}
verify: {{name: integer, answer_pattern: "#"}}
evaluate: {{path: {folder / "heldout.jsonl"}}}
optimizer: {{lr: 1.0e-3}}
train: {{steps: {STEPS}, prompts_per_step: 8, micro_batch_tokens: 512}}
"""
    )
    settings = [f"run.dir={folder / engine}", f"rollout.engine={engine}"]
    return [sys.executable, "-m", "nemo_opd.cli", "train", str(recipe), *settings]


def train(folder: Path, engine: str, stop_after: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run to the end, or ask for a stop once so many steps are done."""
    process = subprocess.Popen(
        command(folder, engine), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ.copy()
    )
    if stop_after is not None:
        while process.poll() is None and len(steps(folder / engine)) < stop_after:
            time.sleep(0.05)
        (folder / engine / "control").mkdir(exist_ok=True)
        (folder / engine / "control" / "stop").write_text("any")
    output, _ = process.communicate(timeout=600)
    return subprocess.CompletedProcess(process.args, process.returncode, output)


def steps(run_dir: Path) -> list[dict[str, float]]:
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    return [line for line in lines if "evaluation" not in line]


def left_in_shared_memory(run_dir: Path) -> list[Path]:
    run = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16]  # other runs have theirs
    return list(Path("/dev/shm").glob(f"nemo_opd-{os.getuid()}-{run}-*"))


def test_the_engine_makes_no_difference(tmp_path: Path) -> None:
    need_vllm()
    make_workspace(tmp_path, head_dim=32)
    done = train(tmp_path, "hf")
    assert done.returncode == 0, done.stdout
    stopped = train(tmp_path, "vllm", stop_after=3)
    assert stopped.returncode == 75, stopped.stdout
    assert 3 <= len(steps(tmp_path / "vllm")) < STEPS
    resumed = train(tmp_path, "vllm")
    assert resumed.returncode == 0, resumed.stdout
    models = [load_file(tmp_path / engine / "model" / "model.safetensors") for engine in ("hf", "vllm")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert not left_in_shared_memory(tmp_path / "vllm"), "weights were left in shared memory"
    assert all(step["time/refit"] > 0 for step in steps(tmp_path / "vllm"))
