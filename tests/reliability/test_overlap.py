"""Rollouts that are being written while weights change, and whole runs of them: real servers, the real vLLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nemo_opd.assemble import decoder
from nemo_opd.checkpoint.store import newest_checkpoint
from nemo_opd.engines.hf.generator import HFGenerator
from nemo_opd.engines.vllm.calls import Servers
from nemo_opd.engines.vllm.generator import VLLMGenerator
from nemo_opd.prompts.template import load_tokenizer
from nemo_opd.rollout.kept import FILE, KeptRollouts
from nemo_opd.rollout.seeds import derive_seed
from nemo_opd.types import GenerateRequest, Prompt, Rollout, Sampling
from tests.helpers.servers import need_vllm, serving
from tests.helpers.tiny import tiny_checkpoint
from tests.helpers.workspace import make_workspace

pytestmark = pytest.mark.slow

SIZES: dict[str, Any] = {"vocab_size": 40, "head_dim": 32}
LONG = Sampling(240)


def requests(count: int) -> list[GenerateRequest]:
    prompts = [Prompt(index, 0, (), (2 + index % 30, 5, 7)) for index in range(count)]
    return [GenerateRequest(prompt, 0, derive_seed(3, 0, prompt.index, 0)) for prompt in prompts]


def never() -> bool:
    return False


def test_responses_go_on_with_the_new_weights_and_are_what_these_say(tmp_path: Path) -> None:
    """Two threads write, more than the slots hold, while weights change twice; each stretch of a response is what the
    `hf` generator makes of its seed, the stretches before it and the weights that its versions name."""
    folders = {v: tiny_checkpoint(tmp_path / f"version {v}", seed=v, **SIZES) for v in (0, 1, 2)}
    weights = {version: load_file(folder / "model.safetensors") for version, folder in folders.items()}
    asked, found = requests(40), []
    with serving(folders[0], tmp_path, 1) as urls:
        generator = VLLMGenerator(Servers(urls, "session", tmp_path, slots=8), folders[0])
        generator.load_weights(iter(weights[0].items()), version=0)
        first = generator.generate(asked[:4], LONG, never)
        found.append(next(first))  # the engine is warm, the others are under way
        halves = [asked[4:22], asked[22:]]
        writers = [
            threading.Thread(target=lambda part=part: found.extend(generator.generate(part, LONG, never)))
            for part in halves
        ]
        for writer in writers:
            writer.start()
        for version in (1, 2):
            time.sleep(0.3)
            generator.load_weights(iter(weights[version].items()), version)
        found += first
        for writer in writers:
            writer.join()
        generator.close()
    assert sorted(rollout.prompt.index for rollout in found) == list(range(40))
    versions = [rollout.policy_version.unique_consecutive().tolist() for rollout in found]
    assert all(some == sorted(some) for some in versions)
    assert any(len(some) > 1 for some in versions), "blind unless weights changed in the middle of a response"
    assert {version for some in versions for version in some} == {0, 1, 2}
    for version in (0, 1, 2):
        check_stretches(folders[version], version, found)


def check_stretches(folder: Path, version: int, found: Sequence[Rollout]) -> None:
    asked = {request.prompt.index: request for request in requests(40)}
    expected: list[GenerateRequest] = []
    bounds: dict[int, tuple[int, int]] = {}
    for rollout in found:
        places = (rollout.policy_version == version).nonzero().flatten().tolist()
        if places:
            start, end = places[0], places[-1] + 1
            index, ids = rollout.prompt.index, tuple(rollout.response_ids[:start].tolist())
            bounds[index] = start, end
            expected.append(replace(asked[index], prefix_ids=ids, max_new_tokens=end))
    written = {rollout.prompt.index: rollout for rollout in found}
    for rollout in HFGenerator(folder, eos_ids=()).generate(expected, LONG, never):
        start, end = bounds[rollout.prompt.index]
        ours = written[rollout.prompt.index]
        assert torch.equal(rollout.response_ids, ours.response_ids[:end])
        pair = rollout.sampler_logprobs[start:], ours.sampler_logprobs[start:end]
        torch.testing.assert_close(*pair, rtol=0, atol=5e-5)


STEPS, PROMPTS = 8, 8


def command(folder: Path, staleness: int, processes: int = 2) -> list[str]:
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"""
run: {{dir: {folder / "run"}}}
student: {{model: {folder / "student"}, dtype: float32}}
teacher: {{model: {folder / "teacher"}, dtype: float32}}
data: {{path: {folder / "train.jsonl"}, max_prompt_tokens: 32}}
rollout: {{engine: vllm, staleness: {staleness}, dtype: float32, max_new_tokens: 96, samples_per_prompt: 2}}
loss: {{name: policy_gradient}}
verify: {{name: integer, answer_pattern: "#"}}
evaluate: {{path: {folder / "heldout.jsonl"}, every: 3, max_new_tokens: 24}}
optimizer: {{lr: 1.0e-3}}
train: {{steps: {STEPS}, prompts_per_step: {PROMPTS}, micro_batch_tokens: 1024, processes: {processes}}}
checkpoint: {{every: 1, keep: 10}}
observe: {{rollouts_per_step: {2 * PROMPTS}}}
"""
    )
    return [sys.executable, "-m", "nemo_opd.cli", "train", str(recipe)]


def lines(run_dir: Path, evaluation: bool) -> list[dict[str, float]]:
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    found = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    return [line for line in found if line.get("evaluation", False) is evaluation]


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=600)
    return process.returncode, output


def start(words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ.copy())


def test_a_run_whose_rollouts_are_ahead(tmp_path: Path) -> None:
    """Two ranks, a checkpoint after every step, a stop in the middle, and one rank after it. Every prompt is trained on
    once, tokens are no older than they may be, what was finished when the run stopped is trained on as it is, and an
    evaluation with rollouts under way is that of the checkpoint by `hf` alone."""
    need_vllm()
    staleness = 2
    folder, run_dir = make_workspace(tmp_path, head_dim=32), tmp_path / "run"
    process = start(command(folder, staleness))
    while process.poll() is None and len(lines(run_dir, False)) < 4:
        time.sleep(0.05)
    (run_dir / "control").mkdir(exist_ok=True)
    (run_dir / "control" / "stop").write_text("any")
    code, output = finish(process)
    assert code == 75, output
    assert 4 <= len(lines(run_dir, False)) < STEPS
    kept = kept_rollouts(run_dir)
    code, output = finish(start(command(folder, staleness, processes=1)))
    assert code == 0, output
    assert f"{len(kept)} rollouts were finished before" in output and kept

    steps = lines(run_dir, False)
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    trained = [prompts_of(run_dir, step) for step in range(1, STEPS + 1)]
    assert sorted(index for step in trained for index in step) == sorted(2 * list(range(STEPS * PROMPTS)))
    shares = torch.tensor([[line[f"rollout/staleness_{age}"] for age in range(staleness + 1)] for line in steps])
    torch.testing.assert_close(shares.sum(1), torch.ones(STEPS))
    assert (shares[:, 1:].sum(0) > 0).all() and shares[0, 0] == 1.0
    assert all(line["optimizer/skipped"] == 0 and line["loss/total"] == line["loss/total"] for line in steps)
    texts = {name: text for step in range(1, STEPS + 1) for name, text in texts_of(run_dir, step).items()}
    tokenizer = load_tokenizer(str(folder / "student"))
    decode = decoder(tokenizer)
    assert all(texts[name] == decode(rollout.response_ids) for name, rollout in kept.items())
    check_evaluation(folder, run_dir, step=3)


def kept_rollouts(run_dir: Path) -> dict[tuple[int, int], Rollout]:
    """By (prompt, sample), what the newest checkpoint holds that is not trained on."""
    newest = newest_checkpoint(run_dir / "checkpoints")
    assert newest is not None
    kept = KeptRollouts(newest / FILE)
    return {(r.prompt.index, r.sample): r for group in kept._groups.values() for r in group}


def texts_of(run_dir: Path, step: int) -> dict[tuple[int, int], str]:
    text = (run_dir / "rollouts" / f"step-{step:08d}.jsonl").read_text()
    return {(r["index"], r["sample"]): r["response"] for r in map(json.loads, text.splitlines())}


def prompts_of(run_dir: Path, step: int) -> list[int]:
    text = (run_dir / "rollouts" / f"step-{step:08d}.jsonl").read_text()
    return [json.loads(line)["index"] for line in text.splitlines()]


def check_evaluation(folder: Path, run_dir: Path, step: int) -> None:
    during: Mapping[str, float] = next(line for line in lines(run_dir, True) if line["step"] == step)
    out = folder / "evaluation.json"
    words = [sys.executable, "-m", "nemo_opd.cli", "eval", str(run_dir / "checkpoints" / f"step-{step:08d}")]
    settings = ["verify.name=integer", "verify.answer_pattern=#", "rollout.max_new_tokens=24"]
    code, output = finish(start([*words, "--data", str(folder / "heldout.jsonl"), "--out", str(out), *settings]))
    assert code == 0, output
    alone = json.loads(out.read_text())
    assert during["evaluation/length"] == alone["mean_length"]
    assert during["evaluation/avg@1"] == alone["estimates"][0]["value"]
