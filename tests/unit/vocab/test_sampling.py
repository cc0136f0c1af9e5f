"""Filters against a plain reference, draws against the distribution they claim to come from."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from nemo_opd.types import Sampling
from nemo_opd.vocab import sampling as module
from nemo_opd.vocab.noise import seed_tensor
from nemo_opd.vocab.sampling import draw, process_logits

SETTINGS = [
    Sampling(1),
    Sampling(1, temperature=0.5),
    Sampling(1, temperature=2.0),
    Sampling(1, top_k=1),
    Sampling(1, top_k=7),
    Sampling(1, top_k=1000),
    Sampling(1, top_p=0.9),
    Sampling(1, top_p=0.3),
    Sampling(1, top_p=1e-9),
    Sampling(1, temperature=1.7, top_p=0.8, top_k=12),
]


def logits_rows(rows: int, vocab_size: int = 50, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(11))


def many(row: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    return row.expand(count, -1), seed_tensor(list(range(count))), torch.zeros(count, dtype=torch.int64)


def kept_by_brute_force(row: Tensor, sampling: Sampling) -> set[int]:
    """Python floats and sorted lists: temperature, then top-k, then the smallest set that reaches top_p."""
    scaled = [value / sampling.temperature for value in row.tolist()]
    order = sorted(range(len(scaled)), key=lambda token: -scaled[token])
    if sampling.top_k:
        order = order[: sampling.top_k]
    weights = [math.exp(scaled[token] - scaled[order[0]]) for token in order]
    kept, mass = set(), 0.0
    for token, weight in zip(order, weights, strict=True):
        if kept and mass >= sampling.top_p * sum(weights):
            break
        kept.add(token)
        mass += weight
    return kept


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_filters_keep_what_brute_force_keeps(sampling: Sampling) -> None:
    for row in logits_rows(40):
        processed = process_logits(row[None], sampling)[0]
        assert set(processed.isfinite().nonzero().flatten().tolist()) == kept_by_brute_force(row, sampling)
        kept = processed.isfinite()
        torch.testing.assert_close(processed[kept], row[kept] / sampling.temperature)


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_filters_agree_with_transformers(sampling: Sampling) -> None:
    expected = TemperatureLogitsWarper(sampling.temperature)(None, logits_rows(40))
    if sampling.top_k:
        expected = TopKLogitsWarper(sampling.top_k)(None, expected)
    if sampling.top_p < 1.0:
        expected = TopPLogitsWarper(sampling.top_p)(None, expected)
    torch.testing.assert_close(process_logits(logits_rows(40), sampling), expected)


def test_top_k_comes_before_top_p() -> None:
    """Masses .4 .3 .2 .1: after top-k 2 they are .57 .43, so top_p .5 keeps one; top-p first would keep two."""
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert int(process_logits(logits, Sampling(1, top_k=2, top_p=0.5)).isfinite().sum()) == 1
    assert int(process_logits(logits, Sampling(1, top_p=0.5)).isfinite().sum()) == 2


def test_ties_with_the_kth_logit_stay() -> None:
    processed = process_logits(torch.tensor([[3.0, 1.0, 1.0, 0.0]]), Sampling(1, top_k=2))
    assert processed.isfinite().tolist() == [[True, True, True, False]]


def test_logits_are_left_alone() -> None:
    logits = logits_rows(3)
    draw(logits, Sampling(1, 0.5, 0.5, 5), seed_tensor([1, 2, 3]), torch.zeros(3, dtype=torch.int64))
    assert torch.equal(logits, logits_rows(3))


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_draws_follow_the_processed_distribution(sampling: Sampling) -> None:
    """Chi-square over 20,000 draws against float64 probabilities, at the 99.99 % point (Wilson-Hilferty)."""
    row = logits_rows(1, vocab_size=24, scale=1.0)
    logits, seeds, positions = many(row, 20_000)
    ids, logprobs = draw(logits, sampling, seeds, positions)
    expected_logprobs = process_logits(row.double(), sampling)[0].log_softmax(-1)
    torch.testing.assert_close(logprobs.double(), expected_logprobs[ids], rtol=0, atol=1e-5)
    expected = expected_logprobs.exp() * 20_000
    counts = torch.bincount(ids, minlength=24).double()
    assert float(counts[expected == 0].sum()) == 0
    support = expected > 0
    freedom = int(support.sum()) - 1
    if freedom == 0:
        return
    statistic = float(((counts - expected)[support] ** 2 / expected[support]).sum())
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3


def test_noise_at_consecutive_positions_is_as_good_as_other_seeds() -> None:
    row = logits_rows(1, vocab_size=24, scale=1.0)
    count = 20_000
    ids, _ = draw(row.expand(count, -1), Sampling(1), seed_tensor([5] * count), torch.arange(count))
    expected = row[0].double().softmax(-1) * count
    statistic = float(((torch.bincount(ids, minlength=24) - expected) ** 2 / expected).sum())
    assert statistic < 23 * (1 - 2 / 207 + 3.72 * math.sqrt(2 / 207)) ** 3
    pairs = torch.bincount(ids[:-1] * 24 + ids[1:], minlength=576).double()
    expected_pairs = torch.outer(expected, expected).flatten() / count
    statistic = float(((pairs - expected_pairs) ** 2 / expected_pairs).sum())
    assert abs(statistic - 575) < 5 * math.sqrt(2 * 575)


def test_greedy_is_the_argmax_with_the_plain_log_probability() -> None:
    logits = logits_rows(8)
    sampling = Sampling(1, temperature=0.1, top_p=0.2, top_k=3, greedy=True)
    ids, logprobs = draw(logits, sampling, seed_tensor([0] * 8), torch.zeros(8, dtype=torch.int64))
    assert torch.equal(ids, logits.argmax(-1))
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).max(-1).values)


def test_extreme_logits_stay_finite() -> None:
    logits = torch.full((200, 30), -80.0)
    logits[:, 7] = 80.0
    ids, logprobs = draw(logits, Sampling(1), seed_tensor(list(range(200))), torch.arange(200))
    assert set(ids.tolist()) == {7}
    assert bool(logprobs.isfinite().all())


def test_excluded_ids_are_never_drawn() -> None:
    logits = torch.full((500, 20), float("-inf"))
    logits[:, 4:6] = 0.0
    ids, logprobs = draw(logits, Sampling(1), seed_tensor(list(range(500))), torch.zeros(500, dtype=torch.int64))
    assert set(ids.tolist()) == {4, 5}
    torch.testing.assert_close(logprobs, torch.full((500,), math.log(0.5)))


@pytest.mark.parametrize("sampling", [Sampling(1), Sampling(1, 0.8, 0.9, 20)], ids=str)
def test_chunks_of_rows_change_nothing(sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (logits_rows(17), sampling, seed_tensor(list(range(17))), torch.arange(17))
    whole = draw(*arguments)
    monkeypatch.setattr(module, "_ELEMENTS_AT_ONCE", 200)  # four rows at a time
    parts = draw(*arguments)
    assert torch.equal(whole[0], parts[0])
    torch.testing.assert_close(whole[1], parts[1], rtol=0, atol=1e-6)


def test_bfloat16_logits_are_drawn_in_float32() -> None:
    logits = logits_rows(64).bfloat16()
    more = (Sampling(1, 0.7), seed_tensor(list(range(64))), torch.zeros(64, dtype=torch.int64))
    ids, logprobs = draw(logits, *more)
    same_ids, same_logprobs = draw(logits.float(), *more)
    assert torch.equal(ids, same_ids)
    assert torch.equal(logprobs, same_logprobs)
    assert logprobs.dtype == torch.float32
