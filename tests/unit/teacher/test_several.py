"""Several teachers: who is asked, and what a mixture says."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nemo_opd.config import ReverseKLLoss
from nemo_opd.errors import ConfigError
from nemo_opd.losses import build_loss
from nemo_opd.teacher.several import MixedScorer, RoutedContext, RoutedScorer, Routing
from nemo_opd.types import Need, Rollout, ScoreRequest, TeacherNeeds, TeacherScores
from nemo_opd.vocab.fused import OutputLayer, fused_loss
from nemo_opd.vocab.shard import dense_shard
from tests.helpers.losses import Batch, make_data
from tests.helpers.rollouts import make_rollout


def _rollout(index: int, teacher: str | None) -> Rollout:
    rollout = make_rollout(index, 4)
    meta = {} if teacher is None else {"task": teacher}
    return replace(rollout, prompt=replace(rollout.prompt, meta=meta))


class _Fake:
    """A teacher that answers in reverse order, with numbers of its own."""

    def __init__(self, number: int, lost: int = -1, dtype: torch.dtype = torch.float32) -> None:
        self.number, self.lost, self.dtype, self.closed = number, lost, dtype, False
        self.asked: list[int] = []

    def score(self, requests: Sequence[ScoreRequest], needs: TeacherNeeds) -> Iterator[TeacherScores]:
        self.asked += [request.key for request in requests]
        return (self._answer(request, needs) for request in reversed(requests))

    def _answer(self, request: ScoreRequest, needs: TeacherNeeds) -> TeacherScores:
        valid = torch.arange(len(request.response_ids)) != self.lost
        value = torch.full((len(valid), self.number + 1), 10.0 * self.number + request.key, dtype=self.dtype)
        if needs.need is Need.FULL:
            return TeacherScores(request.key, valid, hidden=value)
        return TeacherScores(request.key, valid, sampled_logprobs=value[:, 0].float())

    def close(self) -> None:
        self.closed = True


def _requests(*teachers: int) -> list[ScoreRequest]:
    return [ScoreRequest(key, (1,), torch.tensor([1, 2, 3]), teacher=teacher) for key, teacher in enumerate(teachers)]


def test_a_record_names_its_teacher(caplog: pytest.LogCaptureFixture) -> None:
    routing = Routing("task", ["math", "code"])
    rollouts = [_rollout(0, "code"), _rollout(1, "math"), _rollout(2, "maths"), _rollout(3, None), _rollout(4, "code")]
    with caplog.at_level(logging.WARNING):
        assert routing.numbers(rollouts) == [1, 0, None, None, 1]
        assert routing.numbers(rollouts[2:4]) == [None, None], "once a name was right, others are no reason to stop"
    shares = routing.metrics(rollouts)
    assert shares == {"teacher/math_share": pytest.approx(0.2), "teacher/code_share": pytest.approx(0.4)}
    assert [record.args[0] for record in caplog.records] == ["", "maths"], "each unknown name is said once"


def test_a_key_that_names_no_teacher_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.teacher_key.*whose task is 'maths'; expected one of math, code"):
        Routing("task", ["math", "code"]).numbers([_rollout(0, "maths")])


def test_each_rollout_is_shown_to_its_teacher_in_that_teachers_words() -> None:
    class Words:
        def __init__(self, word: int) -> None:
            self.word = word

        def context_ids(self, rollouts: Sequence[Rollout]) -> list[tuple[int, ...] | None]:
            return [(self.word, rollout.prompt.index) for rollout in rollouts]

    context = RoutedContext([Words(7), Words(9)], Routing("task", ["math", "code"]))
    rollouts = [_rollout(0, "code"), _rollout(1, "math"), _rollout(2, "other")]
    assert context.context_ids(rollouts) == [(9, 0), (7, 1), None]


def test_routed_requests_reach_their_teacher_alone() -> None:
    teachers = [_Fake(0), _Fake(1)]
    scorer = RoutedScorer(teachers)
    answers = {a.key: a for a in scorer.score(_requests(1, 0, 1), TeacherNeeds(Need.FULL))}
    assert [teacher.asked for teacher in teachers] == [[1], [0, 2]]
    assert {key: float(a.hidden[0, 0]) for key, a in answers.items() if a.hidden is not None} == {0: 10, 1: 1, 2: 12}
    scorer.close()
    assert all(teacher.closed for teacher in teachers)


def test_a_mixture_adds_up_log_probabilities_with_its_weights() -> None:
    scorer = MixedScorer([_Fake(0, lost=0), _Fake(1, lost=2)], [3.0, 1.0])
    answers = sorted(scorer.score(_requests(0, 0), TeacherNeeds(Need.SAMPLED)), key=lambda a: a.key)
    for key, answer in enumerate(answers):
        assert answer.sampled_logprobs is not None
        torch.testing.assert_close(answer.sampled_logprobs, torch.full((3,), 0.75 * key + 0.25 * (10 + key)))
        assert answer.valid.tolist() == [False, True, False], "both teachers must have scored the token"


def test_hidden_states_of_a_mixture_are_exact_enough_for_logits() -> None:
    scorer = MixedScorer([_Fake(0, dtype=torch.bfloat16), _Fake(1)], [1.0, 2.0])
    (answer,) = scorer.score(_requests(0), TeacherNeeds(Need.FULL))
    assert answer.hidden is not None and answer.hidden.dtype == torch.float32
    assert answer.hidden.shape == (3, 1 + 2) and float(answer.hidden[0, 1]) == pytest.approx(10 * 2 / 3)


def test_ids_that_each_teacher_would_choose_for_itself_are_refused() -> None:
    with pytest.raises(ValueError, match="TOP_K; expected FULL or SAMPLED"):
        MixedScorer([_Fake(0), _Fake(1)], [1.0, 1.0]).score(_requests(0), TeacherNeeds(Need.TOP_K, 3))


def test_the_gradient_against_a_mixture_is_the_weighted_sum_of_the_gradients() -> None:
    """Of reverse KL over the whole vocabulary, in float64; values differ by what does not depend on the student."""
    one, other = make_data(Batch(lost="none", vocab=23)), make_data(Batch(lost="none", vocab=23, seed=5))
    loss, shard, weights = build_loss(ReverseKLLoss()), dense_shard(23), (0.75, 0.25)

    def gradient(teacher_hidden: Tensor, teacher_weight: Tensor) -> tuple[float, Tensor]:
        hidden = one.hidden.clone().requires_grad_()
        tokens = replace(one.tokens, teacher_hidden=teacher_hidden)
        teacher, student = OutputLayer(teacher_weight, shard), OutputLayer(one.weight, shard)
        out = fused_loss(loss, hidden, student, teacher, tokens, {"reverse_kl": float(len(tokens))})
        return float(out.loss.detach()), torch.autograd.grad(out.loss, hidden)[0]

    class Answers:
        def __init__(self, hidden: Tensor) -> None:
            self.hidden = hidden

        def score(self, requests: Sequence[ScoreRequest], needs: TeacherNeeds) -> Iterator[TeacherScores]:
            return iter([TeacherScores(0, torch.ones(len(self.hidden), dtype=torch.bool), hidden=self.hidden)])

        def close(self) -> None:
            pass

    mixture = MixedScorer([Answers(one.teacher_hidden), Answers(other.teacher_hidden)], weights)
    (answer,) = mixture.score(_requests(0), TeacherNeeds(Need.FULL))
    assert answer.hidden is not None
    value, mixed = gradient(answer.hidden, torch.cat([one.teacher_weight, other.teacher_weight], dim=1))
    parts = [gradient(data.teacher_hidden, data.teacher_weight) for data in (one, other)]
    torch.testing.assert_close(mixed, sum(w * g for w, (_, g) in zip(weights, parts, strict=True)), rtol=0, atol=1e-14)
    constant = sum(w * v for w, (v, _) in zip(weights, parts, strict=True)) - value
    logits = [data.teacher_hidden @ data.teacher_weight.T for data in (one, other)]
    disagreement = -sum(w * z.log_softmax(1) for w, z in zip(weights, logits, strict=True)).logsumexp(1).mean()
    assert constant == pytest.approx(float(disagreement), abs=1e-13) and constant > 0.01
