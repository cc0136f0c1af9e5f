"""A run whose teacher is on servers: what has no score trains nothing, is counted, and ends the run if it is much."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_opd.engines.vllm.identity import weights_id
from nemo_opd.reliability.outcome import EXIT_CODES, Status, read_outcome
from nemo_opd.tasks.tokenizer import VOCAB_SIZE
from tests.helpers.ranks import RankPool
from tests.helpers.teachers import StandIn, standing
from tests.helpers.workspace import make_workspace, workspace_config


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("workspace"))


def train_without_beginning(rank: int, workspace: Path, run_dir: Path, overrides: list[str]) -> int:
    """Everything is scored after the last rollout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nemo_opd.assemble.build_early", lambda *_: None)
        return train(rank, workspace, run_dir, overrides)


def train(rank: int, workspace: Path, run_dir: Path, overrides: list[str]) -> int:
    from nemo_opd import session
    from nemo_opd.engines.megatron.parallel import destroy_student_groups

    destroy_student_groups()
    return session.run(workspace_config(workspace, *overrides, run_dir=run_dir))


@pytest.mark.parametrize(
    "loss", [["loss=policy_gradient"], ["loss=tail", "loss.k=4", "loss.teacher=scores", "loss.support=teacher"]]
)
def test_scores_that_do_not_arrive_are_counted_and_end_the_run(
    ranks2: RankPool, workspace: Path, tmp_path: Path, loss: list[str]
) -> None:
    """Two ranks share a student. From the third step on the server fails at about every second response."""
    served = StandIn(scored_ids=VOCAB_SIZE, positions=128, weights=weights_id(workspace / "teacher"))
    served.fault = lambda request: "it has no mood" if len(served.asked) > 16 and sum(request.response) % 2 else ""
    with standing(served) as url:
        overrides = [
            *loss,
            "teacher.engine=vllm",
            f"teacher.servers.urls={url}",
            "student.tensor_model_parallel_size=2",
            "train.steps=9",
            "diagnose.window=2",
        ]
        codes = ranks2.run(train, workspace, tmp_path, overrides)
    assert codes == [EXIT_CODES[Status.DIAGNOSED]] * 2
    outcome = read_outcome(tmp_path)
    assert outcome is not None and outcome.status is Status.DIAGNOSED
    assert outcome.reason.startswith(f"dropped_scores since step {outcome.step}: ")
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if "loss/total" in step]
    assert len(steps) == outcome.step < 9
    assert len(served.asked) == 8 * outcome.step, "ranks that share a loss ask once"
    assert [step["tokens/dropped"] for step in steps[:2]] == [0.0, 0.0]
    for step in steps[2:]:
        assert 0.2 < step["tokens/dropped_share"] < 1.0
        assert step["tokens/trained"] + step["tokens/dropped"] == step["tokens/written"]
        assert step["train/teacher_missing"] == pytest.approx(step["tokens/dropped_share"])


@pytest.mark.parametrize(
    "algorithm",
    [
        ["loss=policy_gradient"],
        ["loss=tail", "loss.k=4", "loss.teacher=scores", "loss.support=teacher", "rollout.samples_per_prompt=3",
         "context=peers", "context.variant=random_peer", "context.fallback=plain_prompt",
         "context.max_tokens=40", "verify.name=integer"],
    ],
)  # fmt: skip
def test_scores_that_were_begun_while_others_were_written_change_nothing(
    ranks2: RankPool, workspace: Path, tmp_path: Path, algorithm: list[str]
) -> None:
    """Two replicas, which train on what the other one wrote too; a rollout's context is its own or its group's."""
    served = StandIn(scored_ids=VOCAB_SIZE, positions=128, weights=weights_id(workspace / "teacher"))
    steps: list[list[dict[str, float]]] = []
    models: list[bytes] = []
    asked: list[list[int]] = []
    with standing(served) as url:
        overrides = [*algorithm, "teacher.engine=vllm", f"teacher.servers.urls={url}", "train.steps=4"]
        for name, way in (("begun", train), ("together", train_without_beginning)):
            assert ranks2.run(way, workspace, tmp_path / name, overrides) == [0, 0]
            lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
            steps.append([_but_for_times(json.loads(line)) for line in lines])
            models.append((tmp_path / name / "model" / "model.safetensors").read_bytes())
            asked.append(served.asked)
            served.asked = []
    assert steps[0] == steps[1] and models[0] == models[1]
    assert len(asked[0]) == len(asked[1]) > 20, "nothing is asked for twice"
    assert set(asked[0]) == {0} and len(set(asked[1])) > 4, "each was begun by itself"


def _but_for_times(line: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in line.items() if not name.startswith(("time/", "speed/", "straggler/"))}
