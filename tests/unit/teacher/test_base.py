"""The teacher's base scores beside it, for losses that ask, and a token needs both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest
import torch

from nemo_opd.teacher.base import WithBase
from nemo_opd.types import Need, ScoreRequest, TeacherNeeds, TeacherScores


@dataclass
class Fake:
    """Answers `value` for every token but the one at `lost`, in reverse order."""

    name: str
    value: float
    lost: int
    log: list[str] = field(default_factory=list)

    def score(self, requests: Sequence[ScoreRequest], needs: TeacherNeeds) -> Iterator[TeacherScores]:
        self.log.append(f"{self.name} asked for {needs.need.name}")
        return self._answers(requests)

    def _answers(self, requests: Sequence[ScoreRequest]) -> Iterator[TeacherScores]:
        for request in reversed(requests):
            self.log.append(f"{self.name} answers {request.key}")
            valid = torch.arange(len(request.response_ids)) != self.lost
            values = torch.full((len(request.response_ids),), self.value)
            yield TeacherScores(request.key, valid, sampled_logprobs=values)

    def close(self) -> None:
        self.log.append(f"{self.name} closed")


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def scorer(log: list[str]) -> WithBase:
    return WithBase(Fake("teacher", -1.0, 0, log), Fake("base", -2.0, 2, log))


REQUESTS = [ScoreRequest(key, (5, 6), torch.arange(4)) for key in (7, 3)]


def test_both_numbers_come_back_and_a_token_needs_both(scorer: WithBase, log: list[str]) -> None:
    answers = {answer.key: answer for answer in scorer.score(REQUESTS, TeacherNeeds(Need.SAMPLED, base=True))}
    assert set(answers) == {7, 3}
    for answer in answers.values():
        assert answer.valid.tolist() == [False, True, False, True]
        assert answer.sampled_logprobs is not None and set(answer.sampled_logprobs.tolist()) == {-1.0}
        assert answer.base_logprobs is not None and set(answer.base_logprobs.tolist()) == {-2.0}
    order = [line.split()[0] for line in log if "answers" in line]
    assert order == ["base", "base", "teacher", "teacher"], "two collective scorers do not take turns"


def test_a_loss_that_does_not_ask_does_not_pay(scorer: WithBase, log: list[str]) -> None:
    assert all(answer.base_logprobs is None for answer in scorer.score(REQUESTS, TeacherNeeds(Need.SAMPLED)))
    assert not any(line.startswith("base") for line in log)
    scorer.close()
    assert log[-2:] == ["teacher closed", "base closed"]
