"""The trap rule on sequences made by hand, and against the obvious slow implementation."""

from __future__ import annotations

import math
import random

import pytest
import torch

from nemo_opd.stop.rule import TrapRule

NAN = math.nan


def judged(rule: TrapRule, values: list[float], threshold: float | None) -> tuple[int | None, int | None, float | None]:
    verdict = rule.judge(torch.tensor(values), threshold)
    return verdict.kept, verdict.detected, verdict.lowest


PLAIN = TrapRule(window=2, consecutive=2, grace=2, stride=1)


def test_the_cut_is_the_start_of_the_first_of_the_consecutive_windows() -> None:
    # windows end at tokens 2..7:  z = 4 3 1 0 0 2
    values = [4.0, 4.0, 2.0, 0.0, 0.0, 0.0, 4.0]
    assert judged(PLAIN, values, 1.5) == (2, 5, 0.0)
    # the window of tokens 3, 4 (z = 1) is the first below 1.5: two tokens are kept, and token 5 settles it


def test_a_rollout_is_told_apart_as_soon_as_the_last_window_is_written() -> None:
    values = [4.0, 4.0, 2.0, 0.0, 0.0, 0.0, 4.0]
    assert judged(PLAIN, values[:4], 1.5)[0] is None
    assert judged(PLAIN, values[:5], 1.5)[0] == 2


def test_equal_to_the_threshold_is_not_below_it() -> None:
    assert judged(PLAIN, [1.0] * 6, 1.0) == (None, None, 1.0)
    assert judged(PLAIN, [1.0] * 6, 1.001) == (0, 3, 1.0)


def test_one_window_above_breaks_the_sequence() -> None:
    rule = TrapRule(window=1, consecutive=3, grace=1, stride=1)
    assert judged(rule, [0.0, 0.0, 5.0, 0.0, 0.0, 5.0, 0.0, 0.0, 0.0], 1.0) == (6, 9, 0.0)
    assert judged(rule, [0.0, 0.0, 5.0, 0.0, 0.0, 5.0], 1.0) == (None, None, 0.0)


def test_a_rollout_shorter_than_the_window_has_no_minimum() -> None:
    verdict = PLAIN.judge(torch.tensor([0.0]), 1.0)
    assert (verdict.kept, verdict.lowest, len(verdict.means)) == (None, None, 0)
    assert judged(PLAIN, [], 1.0) == (None, None, None)
    assert judged(PLAIN, [1.0, 3.0], 9.0) == (None, None, 2.0), "one window is no two"


def test_the_grace_region_is_tested_neither_for_the_cut_nor_for_the_minimum() -> None:
    rule = TrapRule(window=2, consecutive=2, grace=5, stride=1)
    values = [0.0, 0.0, 0.0, 3.0, 3.0, 1.0, 1.0, 1.0]  # windows end at 5..8: z = 3 2 1 1
    assert judged(rule, values, 2.5) == (4, 7, 1.0)
    assert judged(rule, values[:4], 2.5) == (None, None, None)
    assert TrapRule(2, 2, 1, 1).judge(torch.tensor(values), 2.5).kept == 0, "a grace below the window exempts nothing"


def test_only_every_stride_th_window_is_tested() -> None:
    rule = TrapRule(window=2, consecutive=2, grace=2, stride=3)
    values = [4.0, 4.0, 0.0, 0.0, 4.0, 0.0, 0.0, 0.0]  # tested ends 2, 5, 8: z = 4 2 0
    assert judged(rule, values, 3.0) == (3, 8, 0.0)
    assert judged(rule, values[:7], 3.0) == (None, None, 2.0)


def test_without_a_threshold_nothing_is_cut_and_the_minimum_is_over_all() -> None:
    assert judged(PLAIN, [0.0, 0.0, 0.0, -1.0, -1.0], None) == (None, None, -1.0)


def test_after_the_cut_is_known_nothing_is_tested() -> None:
    """m must not depend on how many tokens were written after the detection, which depends on the segments."""
    values = [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert [judged(PLAIN, values[:n], 1.5) for n in (3, 4, 6)] == [(0, 3, 1.0)] * 3


def test_a_window_with_a_missing_score_is_not_tested() -> None:
    values = [0.0, 0.0, NAN, 0.0, 0.0, 0.0]  # whole windows end at 2, 5, 6
    assert judged(PLAIN, values, 1.0) == (3, 6, 0.0)
    assert judged(PLAIN, values[:5], 1.0) == (None, None, 0.0)
    assert judged(PLAIN, [NAN] * 6, 1.0) == (None, None, None)


def slow(rule: TrapRule, values: list[float], threshold: float | None) -> tuple[int | None, int | None, float | None]:
    """The definition, one token after the other."""
    seen, run, first = [], 0, 0
    for t in range(max(rule.window, rule.grace), len(values) + 1, rule.stride):
        z = sum(values[t - rule.window : t]) / rule.window
        if not math.isnan(z):
            seen.append(z)
        if threshold is not None and z < threshold:
            first = t if run == 0 else first
            run += 1
            if run == rule.consecutive:
                return first - rule.window, t, min(seen)
        else:
            run = 0
    return None, None, min(seen, default=None)


def test_against_the_definition_and_in_any_segments() -> None:
    rng = random.Random(0)
    cuts = 0
    for _ in range(400):
        rule = TrapRule(rng.randint(1, 6), rng.randint(1, 4), rng.randint(0, 12), rng.randint(1, 4))
        # Eighths add up exactly, so that ties with the threshold are ties in both.
        values = [rng.randint(0, 8) / 8 for _ in range(rng.randint(0, 40))]
        values = [NAN if rng.random() < 0.03 else value for value in values]
        threshold = None if rng.random() < 0.1 else rng.randint(0, 48) / 48
        expected = slow(rule, values, threshold)
        kept, detected, lowest = judged(rule, values, threshold)
        assert (kept, detected) == expected[:2]
        assert lowest == pytest.approx(expected[2], abs=1e-12)
        for length in range(0, len(values), 5):  # a segment tells nothing else than the whole does
            early = judged(rule, values[:length], threshold)
            assert early[0] == (kept if detected is not None and detected <= length else None)
        cuts += kept is not None
    assert 50 < cuts < 350, "the test is blind unless both happen"
