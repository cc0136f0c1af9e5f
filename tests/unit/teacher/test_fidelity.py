"""A teacher whose weights are rounded to FP8's e4m3, as a stand-in for one that computes in it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from nemo_opd.config import FidelityConfig
from nemo_opd.engines.hf.scorer import HFScorer
from nemo_opd.errors import ConfigError
from nemo_opd.processes import Processes
from nemo_opd.teacher.fidelity import FidelityGate, chosen, divergence
from nemo_opd.types import Need, ScoreRequest, TeacherNeeds, TeacherScores
from tests.contract.scorers import random_requests
from tests.helpers.tiny import tiny_model

VOCAB = 96


class _Rounded:
    """Two scorers of the same weights, before and after rounding."""

    def __init__(self, folder: Path) -> None:
        model = tiny_model(vocab_size=VOCAB)
        model.save_pretrained(folder / "precise")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(torch.float8_e4m3fn).to(parameter.dtype))
        model.save_pretrained(folder / "rough")
        self.precise, self.rough = HFScorer(folder / "precise"), HFScorer(folder / "rough")
        self._now = self.rough
        self.calls: list[tuple[str, Need]] = []

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        self._now = self.precise
        yield
        self._now = self.rough

    def score(self, requests: Sequence[ScoreRequest], needs: TeacherNeeds) -> Iterator[TeacherScores]:
        self.calls.append(("precise" if self._now is self.precise else "rough", needs.need))
        return self._now.score(requests, needs)

    def close(self) -> None:
        self.rough.close()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> _Rounded:
    return _Rounded(tmp_path_factory.mktemp("rounded"))


@pytest.fixture
def requests() -> list[ScoreRequest]:
    return random_requests(8, VOCAB, [(0,)])


def _exact(teacher: _Rounded, requests: Sequence[ScoreRequest]) -> torch.Tensor:
    """KL over the whole vocabulary, from all log-probabilities."""
    needs = TeacherNeeds(Need.TOP_K, VOCAB)
    answers = []
    for scorer in (teacher.precise, teacher.rough):
        rows = []
        for answer in scorer.score(requests, needs):
            assert answer.ids is not None and answer.id_logprobs is not None
            rows.append(torch.zeros(answer.ids.shape).double().scatter(1, answer.ids, answer.id_logprobs.double()))
        answers.append(torch.cat(rows))
    return kl_divergence(Categorical(logits=answers[0]), Categorical(logits=answers[1]))


def _gate(teacher: _Rounded, bound: float, k: int = VOCAB - 1) -> FidelityGate:
    return FidelityGate(teacher, FidelityConfig(max_kl=bound, tokens=10_000, k=k), "teacher", Processes())


def test_the_difference_is_the_kl_of_the_whole_distributions(teacher: _Rounded, requests: list[ScoreRequest]) -> None:
    exact = float(_exact(teacher, [r for r in requests if len(r.response_ids)]).mean())
    assert 1e-4 < exact < 1
    with pytest.raises(ConfigError) as refused:
        _gate(teacher, exact * 0.99).score(requests, TeacherNeeds(Need.FULL))
    (said,) = re.findall(r"differs from its bf16 by (\S+) nats per token", str(refused.value))
    assert float(said) == pytest.approx(exact, rel=1e-2)
    assert str(refused.value).startswith("teacher.fp8.recipe: got a teacher whose FP8 differs")


def test_within_the_bound_it_answers_and_never_asks_again(teacher: _Rounded, requests: list[ScoreRequest]) -> None:
    gate = _gate(teacher, 1.0)
    teacher.calls.clear()
    for _ in range(2):
        answers = list(gate.score(requests, TeacherNeeds(Need.SAMPLED)))
        expected = list(teacher.rough.score(requests, TeacherNeeds(Need.SAMPLED)))
        for ours, theirs in zip(answers, expected, strict=True):
            assert torch.equal(ours.sampled_logprobs, theirs.sampled_logprobs)  # type: ignore[arg-type]
    asked = [("precise", Need.TOP_K), ("rough", Need.AT_IDS), ("rough", Need.SAMPLED), ("rough", Need.SAMPLED)]
    assert teacher.calls == asked


def _seen(teacher: _Rounded, requests: Sequence[ScoreRequest], k: int) -> torch.Tensor:
    with teacher.full_precision():
        precise = {answer.key: answer for answer in teacher.score(requests, TeacherNeeds(Need.TOP_K, k))}
    asked = [replace(request, at_ids=precise[request.key].ids) for request in requests]
    rough = list(teacher.score(asked, TeacherNeeds(Need.AT_IDS, k)))
    return torch.cat([divergence(precise[answer.key], answer) for answer in rough])


def test_fewer_ids_see_less_of_it(teacher: _Rounded, requests: list[ScoreRequest]) -> None:
    few = chosen(requests, 10_000)
    exact, many, less = _exact(teacher, few), _seen(teacher, few, 64), _seen(teacher, few, 8)
    assert bool((many <= exact + 1e-5).all())
    assert 0 < float(less.mean()) < float(many.mean()) < float(exact.mean())


def test_no_more_than_the_tokens_that_were_asked_for(requests: list[ScoreRequest]) -> None:
    lengths = [len(request.response_ids) for request in requests]
    found = chosen(requests, lengths[0] + 1)
    assert [len(request.response_ids) for request in found] == lengths[:2]
    assert {request.consumers for request in found} == {(0,)}


def test_a_token_without_a_score_is_infinitely_far() -> None:
    row = torch.tensor([[0.5, 0.25], [0.5, 0.25]]).log()
    ids = torch.tensor([[0, 1], [0, 1]])
    precise = TeacherScores(0, torch.tensor([True, True]), ids=ids, id_logprobs=row)
    rough = TeacherScores(0, torch.tensor([True, False]), ids=ids, id_logprobs=row)
    assert divergence(precise, rough).tolist() == [0.0, torch.inf]
