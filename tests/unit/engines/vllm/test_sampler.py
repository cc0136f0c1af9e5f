"""What vLLM is left to choose, and what its report says of the distribution: not a bit is lost on the way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_opd.types import BestIds, Sampling
from nemo_opd.vocab.noise import seed_tensor
from nemo_opd.vocab.sampling import draw
from tests.helpers.servers import need_vllm

VOCAB = 50
PLAIN = Sampling(1)


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """vLLM compiles how it counts a token's rank, which takes longer than all else here."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def logits(rows: int) -> Tensor:
    """Flat, usual and sharp rows; in the last one id has all the probability that float32 can tell."""
    found = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(0))
    found *= torch.logspace(-2, 1, rows)[:, None]
    found[-1, 7] = 90.0
    return found


def processed(values: Tensor, samplings: list[tuple[Sampling, bool]]) -> Tensor:
    """The logits as they leave the processor, where every request draws its fourth token; row i has seed i."""
    need_vllm()
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate

    from nemo_opd.engines.vllm.sampler import SeededSampler, draw_arguments

    sampler = SeededSampler(Any, torch.device("cpu"), False)  # type: ignore[arg-type]
    added = [
        (row, SamplingParams(extra_args=draw_arguments(sampling, row, 1, best)), [3], [4, 5])
        for row, (sampling, best) in enumerate(samplings)
    ]
    sampler.update_state(BatchUpdate(batch_size=len(added), removed=[], added=added, moved=[]))
    return sampler.apply(values.clone())


def reported(left: Tensor, k: int) -> tuple[Tensor, Tensor, BestIds | None]:
    """What vLLM takes and reports of the logits that are left, by its own code: ids, log-probabilities, the k best."""
    from vllm.v1.sample.sampler import Sampler

    from nemo_opd.engines.vllm.sampler import reported_ids, told

    ids = Sampler.greedy_sample(left).long()
    report = Sampler.gather_logprobs(left, reported_ids(k, VOCAB), ids)
    drawn, best = told(report.logprob_token_ids, report.logprobs, k)
    assert torch.equal(report.logprob_token_ids[:, 0].long(), ids)
    return ids, drawn, best


@pytest.mark.parametrize("k", [0, 1, 5, VOCAB - 1, VOCAB])
def test_the_report_is_the_distribution_bit_for_bit(k: int) -> None:
    values = logits(64)
    ids, drawn, best = reported(processed(values, [(PLAIN, k > 0)] * 64), k)
    expected_ids, expected = draw(values, PLAIN, seed_tensor(list(range(64)), values.device), torch.full((64,), 3))
    assert torch.equal(ids, expected_ids)
    assert torch.equal(drawn, expected)
    assert (drawn == 0).any(), "blind unless a token was certain"
    if not k:
        assert best is None
        return
    assert best is not None
    top = values.log_softmax(-1).topk(k, dim=1)
    assert torch.equal(best.logprobs, top.values)
    assert torch.equal(values.log_softmax(-1).gather(1, best.ids.long()), best.logprobs), "ids that are not theirs"
    assert best.ids.dtype == torch.int32
    inside = (best.ids == ids[:, None]).any(1)
    assert inside.any() and (k > 5 or not inside.all()), "blind unless both occur"


def test_requests_of_all_kinds_share_a_batch() -> None:
    """A row's number of reported ids is the largest of the batch; the others' rows are cut to their own by vLLM."""
    kinds = [(PLAIN, True), (Sampling(1, 0.7, 0.9, 5), False), (Sampling(1, greedy=True), True), (PLAIN, False)]
    values = logits(4)
    left = processed(values, kinds)
    for row, kind in enumerate(kinds):
        alone = values.clone()
        assert torch.equal(left[row], processed(alone, [(PLAIN, False)] * row + [kind])[row])
    assert (left[[1, 3]].isfinite().sum(1) == 1).all()
    _, drawn, best = reported(left[[0, 2]], 3)
    assert best is not None
    assert torch.equal(best.logprobs, values[[0, 2]].log_softmax(-1).topk(3).values)
    assert drawn[1] == best.logprobs[1, 0], "greedy draws the best"


@pytest.mark.parametrize("k", [0, 3])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_no_tokens(k: int, bad: float) -> None:
    values = logits(3)
    values[1, 4] = bad
    left = processed(values, [(PLAIN, k > 0)] * 3)
    reported(left[[0, 2]], k)
    with pytest.raises(ValueError, match="not finite"):
        reported(left, k)
