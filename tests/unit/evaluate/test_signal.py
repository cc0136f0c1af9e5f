"""Agreement of scores with rewards, against definitions written out."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest

from nemo_opd.evaluate.signal import agreement, auc, concordance, ranks, spearman


def _groups(prompts: int, signal: float, seed: int = 0) -> dict[int, list[tuple[float, float]]]:
    """Rewards of 0 and 1; scores with the reward in them, noise, and how easy the prompt is."""
    drawing = random.Random(seed)
    groups = {}
    for prompt in range(prompts):
        easy = drawing.gauss(0, 3)
        rewards = [float(drawing.random() < 0.5) for _ in range(4)]
        groups[prompt] = [(easy + signal * reward + drawing.gauss(0, 1), reward) for reward in rewards]
    return groups


def test_auc_is_the_share_of_pairs_in_order_ties_half() -> None:
    drawing = random.Random(1)
    scores = [float(drawing.randint(0, 5)) for _ in range(40)]
    success = [drawing.random() < 0.4 for _ in range(40)]
    pairs = [(g, b) for g, s in zip(scores, success, strict=True) if s
             for b, t in zip(scores, success, strict=True) if not t]  # fmt: skip
    expected = sum((g > b) + 0.5 * (g == b) for g, b in pairs) / len(pairs)
    assert auc(np.array(scores), np.array(success)) == pytest.approx(expected)
    assert auc(np.array([3.0, 2.0, 1.0]), np.array([True, False, False])) == 1.0
    assert auc(np.array([1.0, 2.0]), np.array([True, False])) == 0.0
    assert math.isnan(auc(np.array([1.0, 2.0]), np.array([True, True])))


def test_ranks_of_equal_values_are_shared() -> None:
    assert ranks(np.array([10.0, 5.0, 5.0, 7.0])).tolist() == [4.0, 1.5, 1.5, 3.0]


def test_spearman_sees_order_alone() -> None:
    x = np.array([1.0, 2.0, 3.0, 4.0])
    assert spearman(x, np.exp(x)) == pytest.approx(1.0)
    assert spearman(x, -(x**3)) == pytest.approx(-1.0)
    assert spearman(x, np.array([2.0, 1.0, 4.0, 3.0])) == pytest.approx(1 - 6 * 4 / (4 * 15))
    assert math.isnan(spearman(x, np.ones(4)))


def test_pairs_are_of_one_prompt() -> None:
    """A teacher that knows which prompts are easy and nothing about responses has pairwise accuracy one half."""
    groups = {p: [(float(p), float(n < p)) for n in range(4)] for p in range(5)}
    found = agreement(groups, draws=50)
    assert found.auc.value > 0.75 and found.pairwise.value == 0.5
    assert found.pairwise.n == sum(p * (4 - p) for p in range(5))
    assert concordance(np.array([[2.0, 1.0], [1.0, 0.0], [1.5, 1.0]])) == (2.0, 2)


def test_an_interval_covers_and_narrows() -> None:
    few, many = agreement(_groups(20, 1.0)), agreement(_groups(400, 1.0))
    for found in (few, many):
        for estimate in (found.auc, found.spearman, found.pairwise):
            assert estimate.low <= estimate.value <= estimate.high
    truth = 0.5 * (1 + math.erf(1 / 2))  # probability that N(1, 2) is above 0
    assert many.pairwise.low < truth < many.pairwise.high
    assert many.pairwise.high - many.pairwise.low < 0.5 * (few.pairwise.high - few.pairwise.low)
    assert agreement(_groups(20, 1.0)) == few, "seeded"
    assert agreement(_groups(20, 1.0), seed=1).pairwise != few.pairwise


def test_prompts_are_drawn_not_responses() -> None:
    """Copies of a response add nothing: the interval stays as wide as the number of prompts makes it."""
    groups = _groups(30, 1.0)
    copied = {prompt: [row for row in rows for _ in range(10)] for prompt, rows in groups.items()}
    assert agreement(copied).pairwise.low == pytest.approx(agreement(groups).pairwise.low)


@pytest.mark.parametrize("groups", [{}, {0: []}, {0: [(1.0, 1.0)]}, {0: [(1.0, 1.0), (2.0, 1.0)]}])
def test_nothing_to_compare_gives_no_number(groups: dict[int, list[tuple[float, float]]]) -> None:
    found = agreement(groups)
    assert math.isnan(found.auc.value) and math.isnan(found.pairwise.value) and str(found.pairwise) == "-"
    assert json.loads(json.dumps(found.as_dict()))["auc"]["value"] is None
