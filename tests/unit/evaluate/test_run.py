"""Evaluation over ranks: every problem once, missing rewards left out, a stop request gives no half result."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_opd.errors import ConfigError
from nemo_opd.evaluate.run import Evaluation, EvaluationResult
from nemo_opd.processes import Processes
from nemo_opd.reliability.stop import StopRequest
from nemo_opd.types import GenerateRequest, Prompt, Rollout, Sampling, StopRequested
from tests.helpers.ranks import RankPool
from tests.helpers.rollouts import make_prompt, make_rollout, saying


class Writer:
    """A generator whose answer is right for even problems, so that only the bookkeeping is under test."""

    version = 7

    def generate(
        self, requests: Sequence[GenerateRequest], sampling: Sampling, stop_requested: StopRequested
    ) -> Iterator[Rollout]:
        for request in reversed(requests):
            rollout = make_rollout(request.prompt.index, length=5, sample=request.sample)
            yield saying(replace(rollout, prompt=request.prompt), str(request.prompt.index % 2 + request.sample))


def _grade(text: str, prompt: Prompt) -> float | None:
    return None if prompt.index == 6 else float(text == "0")


def _evaluation(problems: int, samples: int) -> Evaluation:
    return Evaluation([make_prompt(i) for i in range(problems)], Sampling(8), samples, _grade, seed=0)


def _measure(rank: int, folder: str, problems: int, samples: int) -> EvaluationResult | None:
    processes = Processes.current()
    stop = StopRequest(Path(folder), "a", processes)
    return _evaluation(problems, samples).measure(Writer(), processes, stop)


def test_every_problem_counts_once_on_any_number_of_ranks(ranks2: RankPool, tmp_path: Path):
    alone = _measure(0, str(tmp_path), 6, 2) if not _initialised() else None
    for result in ranks2.run(_measure, str(tmp_path), 6, 2):
        assert result.estimates[0].name == "avg@2"
        assert result.estimates[0].value == pytest.approx(0.25)  # sample 0 of even problems
        assert [e.name for e in result.estimates[1:]] == ["pass@1", "pass@2"]
        assert result.estimates[2].value == pytest.approx(0.5)
        assert result.mean_length == 5.0
        assert alone is None or result == alone


def _initialised() -> bool:
    import torch.distributed as dist

    return dist.is_initialized()


def test_a_problem_without_a_reward_is_left_out_and_counted(ranks2: RankPool, tmp_path: Path):
    for result in ranks2.run(_measure, str(tmp_path), 7, 1):
        assert result.unverified == 1
        assert result.estimates[0].problems == 6
        assert "1 problems left out" in str(result)


def test_a_stop_request_gives_no_result(tmp_path: Path):
    (tmp_path / "control").mkdir()
    (tmp_path / "control" / "stop").write_text("any")
    assert _evaluation(4, 1).measure(Writer(), Processes(), StopRequest(tmp_path, "a", Processes())) is None


def test_nothing_verified_is_an_error():
    with pytest.raises(ConfigError, match="without a single verified answer"):
        EvaluationResult.of([[math.nan], [math.nan]], mean_length=1.0)
