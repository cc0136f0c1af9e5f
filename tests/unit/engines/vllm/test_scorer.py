"""The served teacher's client against servers without a model: alignment, faults, who asks. The real vLLM is in
tests/contract/test_scorer.py and tests/reliability/test_teacher_servers.py."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_opd.engines.vllm.calls import EARLY_CALLS, Servers
from nemo_opd.engines.vllm.client import ServerRefused
from nemo_opd.engines.vllm.pool import SENDINGS
from nemo_opd.engines.vllm.scorer import VLLMScorer
from nemo_opd.engines.vllm.settings import WRITER
from nemo_opd.engines.vllm.wire import Refused, Score
from nemo_opd.types import Need, ScoreRequest, TeacherNeeds, TeacherScores
from tests.helpers.ranks import RankPool
from tests.helpers.teachers import IDS, StandIn, logprob, standing

K = 4
SAMPLED = TeacherNeeds(Need.SAMPLED)

Make = Callable[..., VLLMScorer]


@pytest.fixture
def make() -> Iterator[Make]:
    """Scorers of stand-ins; 4 requests at a time, lost servers are tried again for half a second."""
    with ExitStack() as stack:

        def make(*served: StandIn, key: str | None = None, patience: float = 0.5, stuck: float = 30.0) -> VLLMScorer:
            urls = [stack.enter_context(standing(one)) for one in served]
            servers = Servers(urls, "session", Path(), key, slots=4, stuck_seconds=stuck)
            scorer = VLLMScorer(servers, IDS, rank=0, patience=patience)
            stack.callback(scorer.close)
            return scorer

        yield make


def requests(count: int, longest: int = 12, consumers: tuple[int, ...] = (0,)) -> list[ScoreRequest]:
    draw = torch.Generator().manual_seed(3)
    made = []
    for key in range(count):
        before, after = torch.randint(1, longest, (2,), generator=draw).tolist()
        ids = torch.randint(0, IDS, (after,), generator=draw)
        at_ids = torch.randint(0, IDS, (after, K), generator=draw)
        made.append(ScoreRequest(50 + key, tuple(range(before)), ids, consumers, at_ids))
    return made


def expected(request: ScoreRequest, ids: torch.Tensor) -> torch.Tensor:
    rows = [logprob(len(request.context_ids), t, ids[t]) for t in range(len(ids))]
    return torch.stack(rows)


def check_sampled(asked: list[ScoreRequest], answers: list[TeacherScores], missing: set[int]) -> None:
    """Every request is answered once; those of the keys `missing` without a valid row, the others rightly."""
    assert sorted(answer.key for answer in answers) == sorted(request.key for request in asked)
    by_key = {request.key: request for request in asked}
    for answer in answers:
        request = by_key[answer.key]
        assert answer.sampled_logprobs is not None and answer.sampled_logprobs.shape == request.response_ids.shape
        if answer.key in missing:
            assert not answer.valid.any() and answer.sampled_logprobs.isnan().all()
        else:
            assert answer.valid.all()
            assert torch.equal(answer.sampled_logprobs, expected(request, request.response_ids))


@pytest.mark.parametrize("need", [Need.SAMPLED, Need.AT_IDS, Need.TOP_K])
def test_rows_are_about_their_tokens(make: Make, need: Need) -> None:
    scorer, asked = make(StandIn(), StandIn()), requests(23)
    answers = {answer.key: answer for answer in scorer.score(asked, TeacherNeeds(need, K))}
    assert len(answers) == 23
    for request in asked:
        answer = answers[request.key]
        if need is Need.SAMPLED:
            check_sampled([request], [answer], set())
            continue
        assert answer.ids is not None and answer.id_logprobs is not None and answer.valid.all()
        assert torch.equal(answer.id_logprobs, expected(request, answer.ids))
        if need is Need.AT_IDS:
            assert torch.equal(answer.ids, request.at_ids)


def test_what_the_model_has_no_room_for_has_no_score(make: Make) -> None:
    """Of 20 positions one is kept free; a response of 10 after a context of 15 keeps its first 4 rows."""
    served = StandIn(positions=20)
    ids = torch.arange(10)
    cut = ScoreRequest(1, tuple(range(15)), ids, at_ids=ids[:, None].expand(-1, K).contiguous())
    full, longer, none = replace(cut, key=2, context_ids=(1,) * 9), replace(cut, key=3, context_ids=(1,) * 19), cut
    empty = replace(cut, key=4, response_ids=ids[:0], at_ids=torch.zeros(0, K, dtype=torch.int64))
    scorer = make(served)
    for needs in (SAMPLED, TeacherNeeds(Need.TOP_K, K), TeacherNeeds(Need.AT_IDS, K)):
        answers = {answer.key: answer for answer in scorer.score([none, full, longer, empty], needs)}
        assert {key: int(answer.valid.sum()) for key, answer in answers.items()} == {1: 4, 2: 10, 3: 0, 4: 0}
        assert answers[1].valid[:4].all() and all(len(answers[key].valid) == 10 for key in (1, 2, 3))
    assert served.asked.count(2) == 0 and served.asked.count(0) == 3, "keys on the wire are positions in the list"


def test_a_number_that_is_not_finite_is_no_score(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    zero = torch.tensor([-1.0, -torch.inf, torch.nan, -2.0])
    monkeypatch.setattr("tests.helpers.teachers.logprob", lambda context, offset, ids: zero[offset].expand_as(ids))
    (answer,) = make(StandIn()).score([ScoreRequest(1, (1,), torch.arange(4))], SAMPLED)
    assert answer.valid.tolist() == [True, False, False, True]


def test_one_failed_request_costs_no_other(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    served, asked = StandIn(), requests(9)
    served.fault = lambda request: "it has no mood" if request.key == 2 else ""
    check_sampled(asked, list(make(served).score(asked, SAMPLED)), {52})
    assert "1 of 9 responses have no score: it has no mood" in caplog.text


def test_requests_of_a_lost_server_go_to_the_others(make: Make) -> None:
    first, second = StandIn(), StandIn()
    first.fault = lambda request: "die" if len(first.asked) > 6 else ""
    scorer, asked = make(first, second), requests(40)
    check_sampled(asked, list(scorer.score(asked, SAMPLED)), set())
    assert first.dead and scorer.resent > 0
    check_sampled(asked, list(scorer.score(asked, SAMPLED)), set())


def test_without_a_server_scores_are_missing_until_it_is_back(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    served, asked = StandIn(), requests(12)
    scorer = make(served)
    died_at = asked[3].key
    served.fault = lambda request: "die" if asked[request.key].key == died_at else ""
    answers = list(scorer.score(asked, SAMPLED))
    missing = {answer.key for answer in answers if not answer.valid.any()}
    assert died_at in missing and len(missing) >= 1
    check_sampled(asked, answers, missing)
    assert "no server is left of 1" in caplog.text
    served.dead, served.fault = False, lambda request: ""
    check_sampled(asked, list(make_patient(scorer).score(asked, SAMPLED)), set())


def make_patient(scorer: VLLMScorer) -> VLLMScorer:
    """It was tried again meanwhile, and next time is later than half a second."""
    assert scorer._calls is not None
    rule = scorer._calls._pool._return
    assert rule is not None
    scorer._calls._pool._return = replace(rule, patience=10.0)
    return scorer


def test_a_request_that_servers_die_of_is_given_up(make: Make) -> None:
    """It comes back to life each time it is asked; so many deaths are enough."""
    served, asked = [StandIn() for _ in range(SENDINGS + 1)], requests(8)
    for one in served:
        one.fault = lambda request: "die" if request.key == 5 else ""
    answers = list(make(*served).score(asked, SAMPLED))
    assert sum(one.dead for one in served) == SENDINGS
    assert sum(one.asked.count(5) for one in served) == SENDINGS
    missing = {answer.key for answer in answers if not answer.valid.any()}
    assert 55 in missing
    check_sampled(asked, answers, missing)


def test_a_server_whose_engine_makes_no_step_is_given_up(make: Make) -> None:
    first, second = StandIn(), StandIn()
    first.fault = lambda request: "hang"
    asked = requests(12)
    check_sampled(asked, list(make(first, second, stuck=0.3).score(asked, SAMPLED)), set())


def test_leaving_early_is_not_an_error(make: Make) -> None:
    scorer, asked = make(StandIn()), requests(12)
    answers = scorer.score(asked, SAMPLED)
    next(answers)
    del answers
    check_sampled(asked, list(scorer.score(asked, SAMPLED)), set())


def test_what_is_refused(make: Make) -> None:
    with pytest.raises(ValueError, match="got a writer; expected a teacher"):
        make(StandIn(role=WRITER))
    with pytest.raises(ValueError, match="probabilities over 90 ids; expected the student's 96; start it with"):
        make(StandIn(scored_ids=90))
    scorer, (request,) = make(StandIn(at_ids=False)), requests(1)
    with pytest.raises(ValueError, match=r"got FULL; .* choose such a loss, or teacher.engine=megatron"):
        scorer.score([request], TeacherNeeds(Need.FULL))
    with pytest.raises(ValueError, match=r"got AT_IDS; .* let the teacher choose the ids, or serve it on a GPU"):
        scorer.score([request], TeacherNeeds(Need.AT_IDS, K))
    with pytest.raises(ValueError, match="entropy"):
        scorer.score([request], TeacherNeeds(Need.SAMPLED, entropy=True))
    with pytest.raises(ValueError, match="at least one address"):
        make()
    scorer.close()
    with pytest.raises(RuntimeError, match="after close"):
        scorer.score([request], SAMPLED)


def test_the_key_is_asked_for(tmp_path: Path) -> None:
    with standing(StandIn(), key="right") as url:
        for key in (None, "wrong"):
            with pytest.raises(ServerRefused, match="no key, or another one"):
                VLLMScorer(Servers([url], "session", tmp_path, key), IDS)
        VLLMScorer(Servers([url], "session", tmp_path, "right"), IDS).close()


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def same(first: list[TeacherScores], second: list[TeacherScores]) -> bool:
    """Bit for bit, in any order."""
    pairs = zip(sorted(first, key=lambda a: a.key), sorted(second, key=lambda a: a.key), strict=True)
    return all(
        one.key == other.key and all(equal(getattr(one, name), getattr(other, name)) for name in PARTS)
        for one, other in pairs
    )


PARTS = ("valid", "sampled_logprobs", "ids", "id_logprobs")


def equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one.nan_to_num(9.0), other.nan_to_num(9.0))


@pytest.mark.parametrize("needs", [SAMPLED, TeacherNeeds(Need.TOP_K, K)])
def test_what_was_begun_is_not_asked_again_and_is_the_same(make: Make, needs: TeacherNeeds) -> None:
    """Also of responses that are there twice, have no room or no token; whatever number they had when they were begun,
    and in whatever order."""
    first, second = StandIn(positions=20), StandIn(positions=20)
    asked = requests(23, longest=16)
    asked += [replace(asked[3], key=90), replace(asked[4], key=91, response_ids=asked[4].response_ids[:0])]
    whole = list(make(StandIn(positions=20)).score(asked, needs))
    scorer = make(first, second)
    for request in reversed(asked[4:]):
        scorer.begin(replace(request, key=0, consumers=(0,)), needs)
    begun = len([r for r in asked[4:] if len(r.response_ids) and len(r.context_ids) < 19])
    eventually(lambda: len(first.asked + second.asked) == begun)
    assert first.asked and second.asked, "they are dealt out although each comes alone"
    assert same(list(scorer.score(asked, needs)), whole)
    assert len(first.asked + second.asked) == begun + 4
    assert scorer._early == {}
    other = TeacherNeeds(Need.TOP_K, K - 1)
    assert len(list(scorer.score(asked[:2], other))) == 2


def test_of_many_that_are_begun_some_wait_and_none_for_the_servers_of_others(make: Make) -> None:
    """More than may be under way; `score` waits for what has not come."""
    served, asked = StandIn(), requests(5 * EARLY_CALLS)
    scorer = make(served)
    for request in asked:
        scorer.begin(request, SAMPLED)
    check_sampled(asked, list(scorer.score(asked, SAMPLED)), set())
    assert len(served.asked) == len(asked)


def test_what_was_begun_with_a_lost_server_is_asked_again(make: Make) -> None:
    served, asked = StandIn(), requests(12)
    scorer = make(served)
    served.fault = lambda request: "die"
    for request in asked:
        scorer.begin(request, SAMPLED)
    eventually(lambda: all(begun.done() for futures in scorer._early.values() for begun in futures))
    served.dead, served.fault = False, lambda request: ""
    check_sampled(asked, list(make_patient(scorer).score(asked, SAMPLED)), set())


def test_a_failure_of_what_was_begun_is_an_answer(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """The server will fail at it again."""
    served, asked = StandIn(), requests(9)
    served.fault = lambda request: "it has no mood" if request.response == tuple(asked[2].response_ids.tolist()) else ""
    scorer = make(served)
    for request in asked[:5]:
        scorer.begin(request, SAMPLED)
    check_sampled(asked, list(scorer.score(asked, SAMPLED)), {52})
    assert len(served.asked) == 9 and "1 of 9 responses have no score: it has no mood" in caplog.text


def test_a_refusal_of_what_was_begun_is_raised_by_the_score(make: Make) -> None:
    class Refusing(StandIn):
        async def score(self, message: Score) -> AsyncGenerator[Mapping[str, Any], None]:
            raise Refused(400, "it will not")
            yield {}

    scorer, (request,) = make(Refusing()), requests(1)
    scorer.begin(request, SAMPLED)
    with pytest.raises(ServerRefused, match="it will not"):
        list(scorer.score([request], SAMPLED))


def test_closing_drops_what_was_begun(make: Make) -> None:
    served, (request,) = StandIn(), requests(1)
    served.fault = lambda request: "hang"
    scorer = make(served)
    scorer.begin(request, SAMPLED)
    eventually(lambda: bool(served.asked))
    scorer.close()
    with pytest.raises(RuntimeError, match="after close"):
        scorer.begin(request, SAMPLED)


def score_on(rank: int, urls: list[str], asked: list[ScoreRequest], needs: TeacherNeeds) -> list[TeacherScores]:
    scorer = VLLMScorer(Servers(urls, "session", Path(), slots=4), IDS)
    answers = list(scorer.score(asked, needs))
    scorer.close()
    return answers


@pytest.mark.parametrize("need", [Need.SAMPLED, Need.AT_IDS, Need.TOP_K])
def test_the_first_consumer_asks_and_all_get_the_same(ranks2: RankPool, need: Need) -> None:
    """Also where a score is missing: ranks that share a loss must count the same tokens."""
    served, consumers = StandIn(), ((0,), (1,), (0, 1), (1, 0))
    asked = [replace(request, consumers=consumers[i % 4]) for i, request in enumerate(requests(16))]
    served.fault = lambda request: "" if request.key % 5 else "out of order"
    with standing(served) as url:
        answers = ranks2.run(score_on, [url], asked, TeacherNeeds(need, K))
    assert sorted(served.asked) == list(range(16)), "no response is scored twice"
    for rank, mine in enumerate(answers):
        assert sorted(a.key for a in mine) == [r.key for r in asked if rank in r.consumers]
        for answer in mine:
            assert bool(answer.valid.all()) == ((answer.key - 50) % 5 != 0)
    both = [{a.key: a for a in mine} for mine in answers]
    for key in both[0].keys() & both[1].keys():
        assert same([both[0][key]], [both[1][key]])


def begin_and_score_on(
    rank: int, urls: list[str], asked: list[ScoreRequest], begun: list[list[int]], needs: TeacherNeeds
) -> tuple[list[TeacherScores], list[TeacherScores]]:
    """What comes without and with what this rank has begun."""
    scorer = VLLMScorer(Servers(urls, "session", Path(), slots=4), IDS)
    whole = list(scorer.score(asked, needs))
    for number in begun[rank]:
        scorer.begin(asked[number], needs)
    answers = list(scorer.score(asked, needs))
    assert scorer._early == {}
    scorer.close()
    return whole, answers


@pytest.mark.parametrize("need", [Need.SAMPLED, Need.TOP_K])
def test_answers_go_from_whoever_has_begun_to_the_consumers(ranks2: RankPool, need: Need) -> None:
    """The other rank has begun some, both have begun some, and nobody has begun the rest."""
    served, consumers = StandIn(), ((0,), (1,), (0, 1), (1, 0), ())
    asked = [replace(request, consumers=consumers[i % 5]) for i, request in enumerate(requests(25))]
    served.fault = lambda request: "out of order" if len(request.response) == len(asked[2].response_ids) else ""
    begun = [[1, 2, 3, 5, 6, 8, 9, 20], [0, 1, 7, 10, 11, 8, 12, 13]]
    with standing(served) as url:
        answers = ranks2.run(begin_and_score_on, [url], asked, begun, TeacherNeeds(need, K))
    for rank, (whole, mine) in enumerate(answers):
        assert sorted(a.key for a in mine) == [r.key for r in asked if rank in r.consumers]
        assert same(mine, whole)
        assert any(a.valid.all() for a in mine) and any(not a.valid.any() for a in mine)
    wanted = sum(bool(request.consumers) for request in asked)
    twice, unwanted = 2, 1
    assert 2 * wanted <= len(served.asked) <= 2 * wanted + twice + unwanted
