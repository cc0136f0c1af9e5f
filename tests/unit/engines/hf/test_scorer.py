"""The dense reference scorer against a plain forward of each sequence by itself, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_opd.engines.hf.scorer import HFScorer
from nemo_opd.engines.protocols import Scorer
from nemo_opd.types import Need, ScoreRequest, TeacherNeeds, TeacherScores
from tests.helpers.tiny import FAMILIES, tiny_model

VOCAB_SIZE = 48


def requests(count: int = 9) -> list[ScoreRequest]:
    """Contexts of 1 to 5 and responses of 0 to 20 tokens."""
    draws = torch.Generator().manual_seed(2)
    found = []
    for key in range(count):
        context = torch.randint(0, VOCAB_SIZE, (1 + key % 5,), generator=draws)
        response = torch.randint(0, VOCAB_SIZE, (key * 7 % 21,), generator=draws)
        at_ids = torch.randint(0, VOCAB_SIZE, (len(response), 3), generator=draws)
        found.append(ScoreRequest(key, tuple(context.tolist()), response, at_ids=at_ids))
    return found


def reference_logprobs(model: Any, request: ScoreRequest) -> Tensor:
    """[response, vocab], float64, from one unpadded forward."""
    ids = torch.tensor([[*request.context_ids, *request.response_ids.tolist()]])
    with torch.no_grad():
        logits = model(ids).logits[0]
    return logits[len(request.context_ids) - 1 : -1].log_softmax(-1)


def answers(scorer: HFScorer, needs: TeacherNeeds) -> dict[int, TeacherScores]:
    return {scores.key: scores for scores in scorer.score(requests(), needs)}


@pytest.fixture(scope="module", params=FAMILIES)
def models(request: pytest.FixtureRequest) -> tuple[HFScorer, Any]:
    tied = request.param == "qwen2"
    model = tiny_model(request.param, vocab_size=VOCAB_SIZE, tie_word_embeddings=tied)
    reference = tiny_model(request.param, vocab_size=VOCAB_SIZE, tie_word_embeddings=tied).double()
    return HFScorer(model, micro_batch_tokens=50), reference


def test_hidden_states_and_output_weight_give_the_distribution(models: tuple[HFScorer, Any]) -> None:
    scorer, reference = models
    assert isinstance(scorer, Scorer)
    found = answers(scorer, TeacherNeeds(Need.FULL))
    weight = scorer.output_weight()
    assert weight.shape == (VOCAB_SIZE, 32)
    assert not weight.requires_grad
    for request in requests():
        hidden = found[request.key].hidden
        assert hidden is not None and hidden.shape == (len(request.response_ids), 32)
        assert bool(found[request.key].valid.all())
        logprobs = (hidden.double() @ weight.double().T).log_softmax(-1)
        torch.testing.assert_close(logprobs, reference_logprobs(reference, request), rtol=0, atol=5e-5)


@pytest.mark.parametrize("need", [Need.SAMPLED, Need.AT_IDS, Need.TOP_K])
def test_log_probabilities(models: tuple[HFScorer, Any], need: Need) -> None:
    scorer, reference = models
    found = answers(scorer, TeacherNeeds(need, k=3))
    assert sorted(found) == list(range(9))
    for request in requests():
        scores, expected = found[request.key], reference_logprobs(reference, request)
        assert scores.valid.tolist() == [True] * len(request.response_ids)
        assert scores.hidden is None
        if need is Need.SAMPLED:
            ids, got = request.response_ids[:, None], scores.sampled_logprobs
            assert got is not None and got.shape == request.response_ids.shape
            got = got[:, None]
        else:
            ids, got = scores.ids, scores.id_logprobs
            assert ids is not None and got is not None
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), expected.gather(-1, ids), rtol=0, atol=5e-5)
        if need is Need.AT_IDS:
            assert torch.equal(ids, request.at_ids)  # type: ignore[arg-type]
        if need is Need.TOP_K:
            torch.testing.assert_close(got.double(), expected.topk(3).values, rtol=0, atol=5e-5)


@pytest.mark.parametrize("need", [Need.FULL, Need.SAMPLED, Need.AT_IDS, Need.TOP_K])
def test_a_wider_teacher_is_normalised_over_the_students_ids(need: Need) -> None:
    scorer = HFScorer(tiny_model(vocab_size=60), vocab_size=VOCAB_SIZE)
    reference = tiny_model(vocab_size=60).double()
    for scores in scorer.score(requests(), TeacherNeeds(need, k=3)):
        request = requests()[scores.key]
        expected = reference_logprobs(reference, request)[:, :VOCAB_SIZE].log_softmax(-1)
        if need is Need.FULL:
            assert scores.hidden is not None
            got = (scores.hidden @ scorer.output_weight().T).log_softmax(-1).double()
        elif need is Need.SAMPLED:
            assert scores.sampled_logprobs is not None
            got, expected = scores.sampled_logprobs[:, None], expected.gather(-1, request.response_ids[:, None])
        else:
            assert scores.ids is not None and scores.id_logprobs is not None
            assert scores.ids.numel() == 0 or int(scores.ids.max()) < VOCAB_SIZE
            got, expected = scores.id_logprobs, expected.gather(-1, scores.ids)
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=5e-5)


def test_a_narrower_teacher_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got 48 ids; expected at least the student's 49"):
        HFScorer(tiny_model(vocab_size=VOCAB_SIZE), vocab_size=49)


def test_each_rank_answers_what_it_consumes() -> None:
    model = tiny_model(vocab_size=VOCAB_SIZE)
    shared = [
        ScoreRequest(r.key, r.context_ids, r.response_ids, consumers=((0,), (1,), (0, 1))[r.key % 3])
        for r in requests()
    ]
    by_rank = [
        {scores.key for scores in HFScorer(model, rank=rank).score(shared, TeacherNeeds(Need.SAMPLED))}
        for rank in (0, 1)
    ]
    assert by_rank == [{0, 2, 3, 5, 6, 8}, {1, 2, 4, 5, 7, 8}]


@pytest.mark.parametrize(
    "model",
    [("qwen3", {"max_position_embeddings": 16}), ("mistral", {"sliding_window": 16})],
    ids=["positions", "sliding window"],
)
def test_positions_beyond_the_models_reach_are_invalid_not_numbers(model: tuple[str, dict[str, Any]]) -> None:
    scorer = HFScorer(tiny_model(model[0], vocab_size=VOCAB_SIZE, **model[1]))
    response = torch.arange(2, 22)
    for needs in (TeacherNeeds(Need.SAMPLED), TeacherNeeds(Need.FULL), TeacherNeeds(Need.TOP_K, k=2)):
        (long,) = scorer.score([ScoreRequest(0, tuple(range(10)), response)], needs)
        # positions 0 .. 15 exist, and position 9 + t predicts response token t
        assert long.valid.tolist() == [True] * 7 + [False] * 13
        payload = next(p for p in (long.sampled_logprobs, long.hidden, long.id_logprobs) if p is not None)
        assert len(payload) == 20
        assert bool(payload[7:].isnan().all())
        (none,) = scorer.score([ScoreRequest(0, tuple(range(30)), response)], needs)
        assert not bool(none.valid.any())


def test_a_nan_of_the_teacher_is_invalid() -> None:
    model = tiny_model(vocab_size=VOCAB_SIZE)
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = float("nan")
    bad, good = (ScoreRequest(key, (1, 2), torch.tensor([3, 4, 7 + key, 5])) for key in (0, 1))
    for needs in (TeacherNeeds(Need.SAMPLED), TeacherNeeds(Need.FULL), TeacherNeeds(Need.TOP_K, k=2)):
        found = {scores.key: scores for scores in HFScorer(model).score([bad, good], needs)}
        # Earlier rows may be lost as well: attention gives the NaN weight 0, and 0 times NaN is NaN.
        assert not bool(found[0].valid[3])
        assert bool(found[1].valid.all()), "a neighbour in the batch is not touched"


def test_float64_models_are_scored_in_float64() -> None:
    scorer = HFScorer(tiny_model(vocab_size=VOCAB_SIZE, dtype=torch.float64))
    hidden = next(scorer.score(requests()[1:2], TeacherNeeds(Need.FULL))).hidden
    assert hidden is not None and hidden.dtype == torch.float64


def test_the_consumer_keeps_its_gradient_mode() -> None:
    for scores in HFScorer(tiny_model(vocab_size=VOCAB_SIZE)).score(requests(), TeacherNeeds(Need.FULL)):
        assert torch.is_grad_enabled()
        assert scores.hidden is not None and not scores.hidden.is_inference()


@pytest.mark.parametrize(
    ("request_", "needs", "message"),
    [
        (ScoreRequest(4, (), torch.tensor([1])), TeacherNeeds(Need.SAMPLED), "request 4: got an empty context"),
        (ScoreRequest(4, (1,), torch.tensor([48])), TeacherNeeds(Need.SAMPLED), "below the student's 48"),
        (ScoreRequest(4, (1,), torch.tensor([1])), TeacherNeeds(Need.AT_IDS, k=2), "at_ids of shape None"),
        (ScoreRequest(4, (1,), torch.tensor([1])), TeacherNeeds(Need.TOP_K, k=49), r"needs\.k: got 49"),
        (ScoreRequest(4, (1,), torch.tensor([1])), TeacherNeeds(Need.TOP_K), r"needs\.k: got 0"),
    ],
)
def test_bad_requests_are_refused(request_: ScoreRequest, needs: TeacherNeeds, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HFScorer(tiny_model(vocab_size=VOCAB_SIZE)).score([request_], needs)


def test_close_is_idempotent_and_final() -> None:
    scorer = HFScorer(tiny_model(vocab_size=VOCAB_SIZE))
    scorer.close()
    scorer.close()
    with pytest.raises(RuntimeError, match="close"):
        scorer.score([], TeacherNeeds(Need.SAMPLED))
