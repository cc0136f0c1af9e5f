"""Divergence through scorers against a plain forward of both models in float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nemo_opd.engines.hf.scorer import HFScorer
from nemo_opd.engines.protocols import Scorer
from nemo_opd.processes import Processes
from nemo_opd.stop import divergence
from nemo_opd.stop.divergence import FullDivergence, Measure, Span, TailDivergence
from nemo_opd.types import BestIds, Need, ScoreRequest, TeacherNeeds, TeacherScores
from tests.helpers.ranks import RankPool
from tests.helpers.tiny import tiny_model

VOCAB = 48
ALONE = Processes()


def spans(count: int = 7) -> list[Span]:
    """Contexts of different lengths for student and teacher, responses of 1 to 17 tokens."""
    draws = torch.Generator().manual_seed(3)

    def ids(length: int) -> Tensor:
        return torch.randint(0, VOCAB, (length,), generator=draws)

    return [
        Span(tuple(ids(1 + n % 4).tolist()), tuple(ids(2 + n % 3).tolist()), ids(1 + n * 5 % 17)) for n in range(count)
    ]


def scorers() -> tuple[HFScorer, HFScorer]:
    """The teacher knows ids that the student does not."""
    return (
        HFScorer(tiny_model(seed=0, vocab_size=VOCAB)),
        HFScorer(tiny_model(seed=1, vocab_size=VOCAB + 8), vocab_size=VOCAB),
    )


@pytest.fixture(scope="module")
def models() -> tuple[HFScorer, HFScorer]:
    return scorers()


def full(student: HFScorer, teacher: HFScorer) -> FullDivergence:
    return FullDivergence(student, teacher, student.output_weight(), teacher.output_weight())


def reference(support: int | None = None, teacher_chooses: bool = False) -> list[Tensor]:
    """KL per token in float64 from whole forwards; over a support and its rest where `support` is given."""
    student = tiny_model(seed=0, vocab_size=VOCAB).double()
    teacher = tiny_model(seed=1, vocab_size=VOCAB + 8).double()

    def probabilities(model: torch.nn.Module, context: tuple[int, ...], ids: Tensor) -> Tensor:
        with torch.no_grad():
            logits = model(torch.tensor([[*context, *ids.tolist()]])).logits[0]
        return logits[len(context) - 1 : -1, :VOCAB].softmax(-1)

    values = []
    for span in spans():
        p = probabilities(student, span.student_context, span.ids)
        q = probabilities(teacher, span.teacher_context, span.ids)
        if support is not None:
            best = (q if teacher_chooses else p).topk(support, dim=1).indices
            p, q = (torch.cat([d.gather(1, best), 1 - d.gather(1, best).sum(1, keepdim=True)], 1) for d in (p, q))
        values.append((p * (p / q).log()).sum(1))
    return values


def test_full_is_the_divergence(models: tuple[HFScorer, HFScorer]) -> None:
    found = Measure(full(*models), ALONE)(spans())
    for got, expected in zip(found, reference(), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("teacher_chooses", [False, True], ids=["student's ids", "teacher's ids"])
def test_tail_is_the_divergence_of_the_buckets(models: tuple[HFScorer, HFScorer], teacher_chooses: bool) -> None:
    found = Measure(TailDivergence(*models, 5, ALONE, teacher_chooses), ALONE)(spans())
    for got, expected, whole in zip(found, reference(5, teacher_chooses), reference(), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
        assert bool((got <= whole + 1e-5).all()), "fewer buckets tell less"


def test_a_support_of_everything_is_the_divergence(models: tuple[HFScorer, HFScorer]) -> None:
    found = Measure(TailDivergence(*models, VOCAB, ALONE), ALONE)(spans())
    for got, expected in zip(found, reference(), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


def test_segments_of_a_response_have_the_values_of_the_whole(models: tuple[HFScorer, HFScorer]) -> None:
    whole = spans()
    parts = []
    for span in whole:
        middle = len(span.ids) // 2
        head = tuple(span.ids[:middle].tolist())
        parts += [
            replace(span, ids=span.ids[:middle]),
            Span(span.student_context + head, span.teacher_context + head, span.ids[middle:]),
        ]
    measure = Measure(TailDivergence(*models, 5, ALONE), ALONE)
    found = measure(parts)
    for number, expected in enumerate(measure(whole)):
        torch.testing.assert_close(torch.cat(found[2 * number : 2 * number + 2]), expected, rtol=0, atol=1e-4)


def told(processes: Processes, k: int = 5) -> list[Span]:
    """The spans with what the student says of them, each on one rank alone."""
    student, numbered = scorers()[0], list(enumerate(spans()))
    asked = [span.request(number, processes.rank, teacher=False) for number, span in numbered]
    answers = {answer.key: answer for answer in student.score(asked, TeacherNeeds(Need.TOP_K, k))}
    found = []
    for number, span in numbered:
        answer, mine = answers[number], number % 3 % processes.size == processes.rank
        assert answer.ids is not None and answer.id_logprobs is not None
        found.append(replace(span, best=BestIds(answer.ids.int(), answer.id_logprobs) if mine else None))
    return found


def measured_of_writers(rank: int, count: int) -> list[list[float]]:
    processes = Processes.current()
    measure = Measure(TailDivergence(None, scorers()[1], 5, processes), processes, of_writers=True)
    return [values.tolist() for values in measure(told(processes)[:count])]


def test_what_the_student_said_is_what_it_says(models: tuple[HFScorer, HFScorer], ranks2: RankPool) -> None:
    expected = Measure(TailDivergence(*models, 5, ALONE), ALONE)(spans())
    found = Measure(TailDivergence(None, models[1], 5, ALONE), ALONE, of_writers=True)(told(ALONE))
    assert all(torch.equal(got, wanted) for got, wanted in zip(found, expected, strict=True))
    for count in (7, 1):  # with one span a rank has nothing to say
        first, second = ranks2.run(measured_of_writers, count)
        assert first == second
        for got, wanted in zip(first, expected[:count], strict=True):
            torch.testing.assert_close(torch.tensor(got), wanted, rtol=0, atol=1e-6)


def test_a_span_of_which_nobody_knows_what_the_student_said(models: tuple[HFScorer, HFScorer]) -> None:
    measure = Measure(TailDivergence(None, models[1], 5, ALONE), ALONE, of_writers=True)
    with pytest.raises(AssertionError, match="one rank knows"):
        measure([*told(ALONE), *spans()])


class Deaf(Scorer):
    """A scorer whose answer about the first token never arrives."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer

    def score(self, requests: Sequence[ScoreRequest], needs: TeacherNeeds) -> Iterator[TeacherScores]:
        for answer in self._scorer.score(requests, needs):
            valid = answer.valid.clone()
            valid[0] = False
            yield replace(answer, valid=valid)


@pytest.mark.parametrize("kind", ["tail", "full"])
@pytest.mark.parametrize("deaf", ["student", "teacher"])
def test_a_score_that_did_not_arrive_is_no_number(models: tuple[HFScorer, HFScorer], kind: str, deaf: str) -> None:
    student, teacher = models
    rule = full(student, teacher) if kind == "full" else TailDivergence(student, teacher, 5, ALONE)
    found = Measure(replace(rule, **{deaf: Deaf(getattr(rule, deaf))}), ALONE)(spans())
    assert all(bool(values[0].isnan()) and not bool(values[1:].isnan().any()) for values in found)


def test_many_tokens_are_measured_in_blocks(models: tuple[HFScorer, HFScorer], monkeypatch: pytest.MonkeyPatch) -> None:
    measure = Measure(TailDivergence(*models, 5, ALONE), ALONE)
    together = measure(spans())
    monkeypatch.setattr(divergence, "_TOKENS_AT_ONCE", 12)
    assert len(list(divergence._blocks(spans()))) > 3
    for one, other in zip(together, measure(spans()), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert measure([]) == []


def measured(rank: int, kind: str, count: int) -> list[list[float]]:
    student, teacher = scorers()
    processes = Processes.current()
    rule = full(student, teacher) if kind == "full" else TailDivergence(student, teacher, 5, processes)
    return [values.tolist() for values in Measure(rule, processes)(spans()[:count])]


@pytest.mark.parametrize(("kind", "count"), [("tail", 7), ("full", 7), ("tail", 1)], ids=["tail", "full", "idle rank"])
def test_every_rank_knows_all_of_it(ranks2: RankPool, kind: str, count: int) -> None:
    first, second = ranks2.run(measured, kind, count)
    assert first == second
    for got, expected in zip(first, reference(5 if kind == "tail" else None), strict=False):
        torch.testing.assert_close(torch.tensor(got).double(), expected, rtol=1e-4, atol=1e-5)
