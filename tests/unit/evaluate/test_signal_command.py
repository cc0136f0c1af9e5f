"""`nemo-opd signal`: responses, rewards and scores brought together, on untrained models."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemo_opd.cli import main
from nemo_opd.config import PeersContext, PrivilegedContext, SamePromptContext
from nemo_opd.errors import ConfigError
from nemo_opd.types import ScoreRequest, TeacherNeeds, TeacherScores
from tests.helpers.ranks import RankPool
from tests.helpers.rollouts import make_rollout
from tests.helpers.workspace import make_workspace, workspace_config

OVERRIDES = ("verify.name=integer", "rollout.samples_per_prompt=4")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("signal"), problems=8)


class _Knows:
    """A teacher whose scores are the rewards, and who lost a token of the last response."""

    def __init__(self, rewards: Sequence[float]) -> None:
        self.rewards, self.contexts = rewards, []

    def score(self, requests: Sequence[ScoreRequest], needs: TeacherNeeds) -> Iterator[TeacherScores]:
        for request in reversed(requests):
            count = len(request.response_ids)
            valid = torch.ones(count, dtype=torch.bool)
            valid[-1] = request.key != len(self.rewards) - 1
            yield TeacherScores(request.key, valid, sampled_logprobs=torch.full((count,), self.rewards[request.key]))

    def close(self) -> None:
        pass


def test_scores_are_compared_with_the_rewards_of_the_same_responses(workspace: Path) -> None:
    from nemo_opd.evaluate.signal_command import measure, table

    rewards = [1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0]
    rollouts = [replace(make_rollout(n // 4, 5, n % 4), reward=reward) for n, reward in enumerate(rewards)]
    rollouts[2] = replace(rollouts[2], reward=None)
    config = workspace_config(workspace, *OVERRIDES)
    found = measure(config, SamePromptContext(), _Knows(rewards), rollouts, 100)
    assert (found.prompts, found.responses, found.successes) == (2, 5, 3), "neither unverified nor half scored ones"
    assert found.auc.value == found.spearman.value == found.pairwise.value == 1.0
    assert found.pairwise.n == 2 * 1 + 1 * 1
    assert "| plain | 5 (7) | 3 | 1.000 [1.000, 1.000] |" in table({"plain": found}, len(rollouts))


def test_names_of_contexts(workspace: Path) -> None:
    from nemo_opd.evaluate.signal_command import context_slot, default_names

    plain = workspace_config(workspace, *OVERRIDES)
    told = workspace_config(workspace, *OVERRIDES, "context=privileged", "context.field=answer", "context.max_tokens=9")
    peers = workspace_config(workspace, *OVERRIDES, "context=peers", "context.failures=2", "context.max_tokens=99")
    assert default_names(plain)[0] == "same_prompt" and "privileged" not in default_names(plain)
    assert "privileged" in default_names(told)
    privileged = context_slot(told, "privileged")
    assert isinstance(privileged, PrivilegedContext) and privileged.max_tokens == 9
    slot = context_slot(peers, "peers.successes")
    assert isinstance(slot, PeersContext) and (slot.variant, slot.failures, slot.max_tokens) == ("successes", 2, 99)
    with pytest.raises(ConfigError, match="--context: got privileged; expected a recipe that says what"):
        context_slot(plain, "privileged")
    with pytest.raises(ConfigError, match="--context: got peers; expected same_prompt, privileged or one of"):
        context_slot(plain, "peers")
    with pytest.raises(ConfigError, match=r"rollout\.samples_per_prompt: got 1"):
        context_slot(workspace_config(workspace, "rollout.samples_per_prompt=1"), "peers.successes")


def _run(rank: int, recipe: str, out: str, overrides: list[str]) -> int:
    from nemo_opd.engines.megatron.parallel import destroy_student_groups
    from nemo_opd.evaluate import signal_command

    destroy_student_groups()  # of an earlier test in this process
    names = ["same_prompt", "privileged", "peers.contrastive", "peers.random_peer"]
    return signal_command.main(
        argparse.Namespace(recipe=Path(recipe), overrides=overrides, context=names, prompts=3, draws=20, out=Path(out))
    )


@pytest.mark.parametrize("teacher", [(), ("teacher.source=ema", "teacher.model=null", "teacher.engine=megatron")])
def test_the_command(ranks1: RankPool, workspace: Path, tmp_path: Path, teacher: tuple[str, ...]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
run: {{dir: {tmp_path / "run"}}}
student: {{model: {workspace / "student"}, dtype: float32, tensor_model_parallel_size: 2}}
teacher: {{model: {workspace / "teacher"}, dtype: float32, engine: hf}}
data: {{path: {workspace / "train.jsonl"}, max_prompt_tokens: 32}}
context: {{name: privileged, field: answer, max_tokens: 64}}
rollout: {{max_new_tokens: 12, samples_per_prompt: 4}}
verify: {{name: integer}}
train: {{steps: 1}}
"""
    )
    assert ranks1.run(_run, str(recipe), str(tmp_path / "out.json"), list(teacher)) == [0]
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["responses_written"] == 12 and found["teacher"] == str(
        workspace / ("student" if teacher else "teacher")
    )
    assert found["contexts"]["same_prompt"]["responses"] == found["contexts"]["privileged"]["responses"] == 12
    assert found["contexts"]["peers.contrastive"]["prompts"] == 3
    assert not (tmp_path / "run").exists(), "nothing is trained, so there is no run"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompts", "0"], "error: command line: argument --prompts: got 0; expected a whole number from 1"),
        (["train.lr=1"], "error: train.lr: got an unknown key"),
    ],
)
def test_wrong_arguments(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.unit.configuration.workspace import make_workspace as make_recipe

    monkeypatch.chdir(tmp_path)
    make_recipe(tmp_path)
    try:
        code = main(["signal", "recipe.yaml", *words])
    except SystemExit as ended:
        code = int(str(ended.code))
    assert code == 2 and capsys.readouterr().err.startswith(message)
