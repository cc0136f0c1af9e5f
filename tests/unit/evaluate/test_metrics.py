from __future__ import annotations

import itertools
import json
import math
import random
import subprocess
import sys

import pytest

from nemo_opd.evaluate.metrics import avg_at_k, effective_trials, pass_at_k, pass_chance, wilson_interval


@pytest.mark.parametrize(("n", "c", "k"), [(5, 0, 3), (5, 1, 1), (5, 2, 3), (5, 4, 2), (6, 6, 6), (7, 3, 5), (1, 1, 1)])
def test_pass_chance_is_the_share_of_subsets_with_a_right_one(n: int, c: int, k: int) -> None:
    subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
    assert pass_chance(n, c, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets), abs=1e-15)


def test_pass_chance_holds_for_many_samples() -> None:
    assert pass_chance(10_000, 1, 100) == pytest.approx(0.01)
    assert pass_chance(10_000, 9_901, 100) == 1.0


def test_pass_at_k_is_unbiased_where_the_plug_in_estimate_is_not() -> None:
    """For every outcome of 4 samples at p = 0.3, weighted by its probability, the mean is 1 - (1-p)^2 exactly."""
    p, n, k = 0.3, 4, 2
    weight = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    rows = [[1.0] * c + [0.0] * (n - c) for c in range(n + 1)]
    mean = sum(w * pass_at_k([row], k).value for w, row in zip(weight, rows, strict=True))
    plug_in = sum(w * (1 - (1 - c / n) ** k) for c, w in enumerate(weight))
    assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-12)
    assert abs(plug_in - mean) > 0.01


def test_avg_and_pass_by_hand() -> None:
    rewards = [[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]]
    avg, one, two = avg_at_k(rewards), pass_at_k(rewards, 1), pass_at_k(rewards, 2)
    assert avg.value == one.value == pytest.approx(7 / 16)
    assert two.value == pytest.approx((0.5 + 1 + 0 + 5 / 6) / 4)
    assert (avg.name, two.name, avg.problems, avg.samples_per_problem) == ("avg@4", "pass@2", 4, 4)
    assert pass_at_k([[0.5, 0.9]], 1, threshold=0.8).value == 0.5


def test_wilson_against_published_values() -> None:
    """Newcombe 1998, table I: 81/263, 15/148, 0/20, 1/29."""
    for successes, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert wilson_interval(successes / n, n) == pytest.approx((low, high), abs=5e-5)


def test_single_samples_get_the_plain_wilson_interval() -> None:
    estimate = avg_at_k([[1.0]] * 81 + [[0.0]] * 182)
    assert (estimate.low, estimate.high) == wilson_interval(81 / 263, 263)


def test_trials_lie_between_problems_and_samples() -> None:
    agreeing = avg_at_k([[1.0] * 8] * 30 + [[0.0] * 8] * 70)
    plain = avg_at_k([[1.0]] * 30 + [[0.0]] * 70)
    assert (agreeing.low, agreeing.high) == pytest.approx((plain.low, plain.high), abs=2e-3)
    assert effective_trials([0.5] * 100, 8) == 800
    assert effective_trials([1.0] * 100, 8) == effective_trials([0.0], 8) * 100 == 100


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.5), (5.0, 5.0), (1.0, 20.0), (50.0, 1.0)])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(a: float, b: float) -> None:
    """60 problems of Beta(a, b) difficulty, 4 samples each, 1500 times: 95 % up to two points of error and noise."""
    source = random.Random(11)
    covered = 0
    for _ in range(1500):
        rates = [source.betavariate(a, b) for _ in range(60)]
        estimate = avg_at_k([[float(source.random() < p) for _ in range(4)] for p in rates])
        covered += estimate.low <= a / (a + b) <= estimate.high
    assert 0.93 <= covered / 1500 <= 0.99


def test_counting_samples_as_trials_would_not_cover() -> None:
    """The control of the test above: without the effective number the interval is right far too rarely."""
    source = random.Random(11)
    covered = 0
    for _ in range(1000):
        rates = [source.betavariate(0.5, 0.5) for _ in range(60)]
        share = sum(source.random() < p for p in rates for _ in range(4)) / 240
        low, high = wilson_interval(share, 240)
        covered += low <= 0.5 <= high
    assert covered / 1000 < 0.85


@pytest.mark.parametrize(
    "rewards", [[[0.0]], [[1.0]], [[0.0, 1.0]], [[0.3] * 3] * 5, [[1.0, 0.0]] * 9, [[1.0] * 3] * 200]
)
def test_an_interval_contains_its_value_and_stays_in_bounds(rewards: list[list[float]]) -> None:
    for estimate in (avg_at_k(rewards), pass_at_k(rewards, 1)):
        assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
        assert estimate.low < estimate.high


def test_text_and_json() -> None:
    estimate = avg_at_k([[1.0]] * 3 + [[0.0]])
    assert str(estimate) == "avg@1 75.0 % [30.1, 95.4] (n=4)"
    assert str(pass_at_k([[1.0, 0.0]] * 4, 2)).endswith("(n=4 x 2 samples)")
    assert json.loads(json.dumps(estimate.as_dict()))["problems"] == 4


@pytest.mark.parametrize("rewards", [[], [[]], [[1.0], [1.0, 0.0]], [[1.5]], [[-0.1]], [[math.nan]]])
def test_what_is_no_table_of_rewards_is_refused(rewards: list[list[float]]) -> None:
    for metric in (avg_at_k, lambda r: pass_at_k(r, 1)):
        with pytest.raises(ValueError, match="rewards: got"):
            metric(rewards)


@pytest.mark.parametrize("k", [0, 3])
def test_k_beyond_the_samples_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match="draw more samples"):
        pass_at_k([[1.0, 0.0]], k)


def test_metrics_import_neither_torch_nor_transformers() -> None:
    program = "import sys, nemo_opd.evaluate.metrics; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
