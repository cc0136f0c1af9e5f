"""Teachers on servers that die, or are asked for what they must not do: real processes, the real vLLM."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch

from nemo_opd.engines.hf.scorer import HFScorer
from nemo_opd.engines.vllm.calls import Servers
from nemo_opd.engines.vllm.client import ServerRefused
from nemo_opd.engines.vllm.scorer import VLLMScorer
from nemo_opd.engines.vllm.settings import TEACHER
from nemo_opd.types import Need, ScoreRequest, TeacherNeeds, TeacherScores
from tests.helpers.figures import record
from tests.helpers.servers import KEY, Fleet
from tests.helpers.tiny import tiny_checkpoint

pytestmark = pytest.mark.slow

IDS = 90
SAMPLED = TeacherNeeds(Need.SAMPLED)
BOUND = 1e-5
"""In float32, of log-probabilities: two orders of a sum."""


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Teachers that know more ids than the student, and read 64 positions at a time."""
    model = tiny_checkpoint(tmp_path_factory.mktemp("teacher"), vocab_size=101, head_dim=32)
    settings = {"role": TEACHER, "scored_ids": IDS, "batch_tokens": 64, "max_running": 8}
    with Fleet(model, tmp_path_factory.mktemp("fleet"), **settings) as fleet:
        yield fleet


def scorer_of(fleet: Fleet, *numbers: int, patience: float = 2.0) -> VLLMScorer:
    servers = Servers([fleet.url(number) for number in numbers], "session", Path(), KEY, slots=4)
    return VLLMScorer(servers, IDS, rank=0, patience=patience)


def requests(count: int, before: int = 100, after: int = 100) -> list[ScoreRequest]:
    draw = torch.Generator().manual_seed(3)
    made = []
    for key in range(count):
        context = torch.randint(0, 101, (before,), generator=draw)
        ids, at_ids = torch.randint(0, IDS, (after,), generator=draw), torch.randint(0, IDS, (after, 3), generator=draw)
        made.append(ScoreRequest(key, tuple(context.tolist()), ids, at_ids=at_ids))
    return made


@pytest.fixture(scope="module")
def expected(fleet: Fleet) -> dict[int, TeacherScores]:
    reference = HFScorer(fleet.model, vocab_size=IDS, rank=0)
    return {answer.key: answer for answer in reference.score(requests(40), SAMPLED)}


def error(answers: list[TeacherScores], expected: dict[int, TeacherScores]) -> float:
    """The largest, over answers with a score."""
    pairs = [(answer.sampled_logprobs, expected[answer.key].sampled_logprobs) for answer in answers]
    return max(float((a - b).abs().max()) for a, b in pairs if a is not None and b is not None)


def test_a_server_killed_while_it_scores_costs_nothing_but_time(
    fleet: Fleet, expected: dict[int, TeacherScores], caplog: pytest.LogCaptureFixture
) -> None:
    scorer, found = scorer_of(fleet, 0, 1), []
    for answer in scorer.score(requests(40), SAMPLED):
        if not found:
            fleet.kill(1)
        found.append(answer)
    assert sorted(answer.key for answer in found) == list(range(40))
    assert all(answer.valid.all() for answer in found)
    assert error(found, expected) < BOUND
    assert scorer.resent > 0
    # and the last one: what it had not scored is missing, and no number stands in its place
    found = []
    for answer in scorer.score(requests(40), SAMPLED):
        if not found:
            fleet.kill(0)
        found.append(answer)
    scored = [answer for answer in found if answer.valid.all()]
    missing = [answer for answer in found if not answer.valid.any()]
    assert len(scored) + len(missing) == len(found) == 40 and scored and missing
    assert all(a.sampled_logprobs is not None and a.sampled_logprobs.isnan().all() for a in missing)
    assert error(scored, expected) < BOUND
    assert "responses have no score" in caplog.text
    substituted = sum(int(answer.sampled_logprobs.isfinite().sum()) for answer in missing)  # type: ignore[union-attr]
    record("R13", f"numbers in the place of {len(missing)} scores that a killed server left out", str(substituted))
    # started again, they are asked again
    fleet.start(0, 1)
    scorer.close()
    scorer = scorer_of(fleet, 0, 1, patience=60.0)
    fleet.kill(0)
    fleet.start(0)
    found = list(scorer.score(requests(40), SAMPLED))
    assert all(answer.valid.all() for answer in found) and error(found, expected) < BOUND
    scorer.close()


@pytest.mark.parametrize("need", [Need.AT_IDS, Need.TOP_K])
def test_at_the_edge_of_what_the_model_can_read(fleet: Fleet, need: Need) -> None:
    """The reference reads 256 positions, a server 255: one row less of a response that needs all."""
    asked = [
        *requests(1, before=200, after=100),
        *requests(1, before=300, after=5),
        *requests(1, before=155, after=100),
    ]
    asked = [ScoreRequest(key, r.context_ids, r.response_ids, at_ids=r.at_ids) for key, r in enumerate(asked)]
    needs, scorer = TeacherNeeds(need, 3), scorer_of(fleet, 0)
    reference = {a.key: a for a in HFScorer(fleet.model, vocab_size=IDS, rank=0).score(asked, needs)}
    answers = {a.key: a for a in scorer.score(asked, needs)}
    assert [int(answers[key].valid.sum()) for key in range(3)] == [55, 0, 100]
    assert [int(reference[key].valid.sum()) for key in range(3)] == [57, 0, 100]
    for key, answer in answers.items():
        got, right = answer.id_logprobs, reference[key].id_logprobs
        assert got is not None and right is not None and answer.ids is not None
        assert torch.allclose(got[answer.valid], right[answer.valid], rtol=0, atol=BOUND)
        assert int(answer.ids.max()) < IDS
    scorer.close()


def post(fleet: Fleet, path: str, values: object, key: str | None = KEY) -> httpx.Response:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return httpx.post(f"{fleet.url(0)}{path}", json=values, headers=headers, timeout=60)


def test_a_teacher_takes_no_weights_writes_nothing_and_wants_its_key(fleet: Fleet, tmp_path: Path) -> None:
    for path in ("/generate", "/refit", "/", "/docs", "/v1/completions", "/collective_rpc", "/metrics"):
        assert post(fleet, path, {}).status_code == 404, path
    for path in ("/attach", "/score"):
        assert post(fleet, path, {}).status_code == 400
        assert post(fleet, path, {}, None).status_code == post(fleet, path, {}, "another").status_code == 401
    with pytest.raises(ServerRefused, match="no key, or another one"):
        VLLMScorer(Servers([fleet.url(0)], "session", Path(), "another"), IDS)
    with pytest.raises(ValueError, match="probabilities over 90 ids; expected the student's 101"):
        VLLMScorer(Servers([fleet.url(0)], "session", Path(), KEY), 101)
    VLLMScorer(Servers([fleet.url(0)], "session", Path(), KEY), IDS, model=fleet.model).close()
    other = tiny_checkpoint(tmp_path, vocab_size=101, head_dim=32, seed=1)
    with pytest.raises(ValueError, match="got other weights than those in"):
        VLLMScorer(Servers([fleet.url(0)], "session", Path(), KEY), IDS, model=other)


def test_what_is_no_score_request_is_refused_and_hurts_nobody(fleet: Fleet) -> None:
    fine = {"key": 0, "context": [1, 2], "response": [3], "at_ids": ""}
    for change in ({"need": "full"}, {"need": "top_k"}, {"need": "top_k", "k": 91}, {"need": "at_ids", "k": 1}):
        answer = post(fleet, "/score", {"need": "sampled", "k": 0, "requests": [fine], **change})
        assert answer.status_code == 400, (change, answer.text)
    for request in ({**fine, "context": []}, {**fine, "response": []}, {**fine, "response": [0.5]}, {"key": 1}):
        assert post(fleet, "/score", {"need": "sampled", "k": 0, "requests": [request]}).status_code == 400
    for request in ({**fine, "response": [3] * 254}, {**fine, "response": [101]}, {**fine, "context": [-1]}):
        answer = post(fleet, "/score", {"need": "sampled", "k": 0, "requests": [request, {**fine, "key": 1}]})
        lines = {line["key"]: line for line in lines_of(answer) if "key" in line}
        assert "error" in lines[0] and "numbers" in lines[1], answer.text


def lines_of(answer: httpx.Response) -> list[dict[str, object]]:

    assert answer.status_code == 200, answer.text
    return [json.loads(text) for text in answer.text.splitlines()]
