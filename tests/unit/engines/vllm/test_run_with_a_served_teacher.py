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
    """Two ranks share a student. From the third step on, every second response is one that the server fails at."""
    served = StandIn(scored_ids=VOCAB_SIZE, positions=128, weights=weights_id(workspace / "teacher"))
    served.fault = lambda request: "it has no mood" if len(served.asked) > 16 and request.key % 2 else ""
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
