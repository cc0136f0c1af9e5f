"""Rewards of a group become advantages."""

from __future__ import annotations

import math

import pytest

from nemo_opd.rollout.advantages import averaged_by_response, group_relative, groups, says_nothing
from nemo_opd.types import Rollout
from tests.helpers.rollouts import make_rollout


def _group(index: int, *rewards: float | None) -> list[Rollout]:
    return [make_rollout(index, 4, sample=n, reward=reward) for n, reward in enumerate(rewards)]


def test_the_mean_of_the_own_group_is_taken_off() -> None:
    rollouts = [*_group(0, 1.0, 0.0, 0.0, 0.0), *_group(7, 0.5, 1.0)]
    assert group_relative(rollouts) == [0.75, -0.25, -0.25, -0.25, -0.25, 0.25]


def test_groups_are_found_wherever_their_rollouts_stand() -> None:
    first, second = _group(0, 1.0, 0.0), _group(1, 0.0, 1.0)
    mixed = [first[0], second[0], second[1], first[1]]
    assert list(groups(mixed).values()) == [[0, 3], [1, 2]]
    assert group_relative(mixed) == [0.5, -0.5, 0.5, -0.5]


def test_divided_by_the_standard_deviation() -> None:
    advantages = group_relative(_group(0, 3.0, 1.0, 2.0, 2.0), divide_by_std=True, std_eps=0.0)
    assert advantages == pytest.approx([math.sqrt(2), -math.sqrt(2), 0.0, 0.0])
    shrunk = group_relative(_group(0, 3.0, 1.0, 2.0, 2.0), divide_by_std=True, std_eps=1.0)
    assert shrunk[0] == pytest.approx(1.0 / (math.sqrt(0.5) + 1.0))


@pytest.mark.parametrize("rewards", [(1.0, 1.0, 1.0), (0.0, 0.0), (0.3,), (0.5, None)])
def test_a_group_of_equal_rewards_says_nothing(rewards: tuple[float | None, ...]) -> None:
    """Exactly: 0.1 + 0.1 + 0.1 is not 3 times 0.1, and such dust divided by a deviation of 0 would be 1."""
    rollouts = _group(0, *rewards)
    assert says_nothing(rollouts)
    for advantage, reward in zip(group_relative(rollouts, divide_by_std=True), rewards, strict=True):
        assert math.isnan(advantage) if reward is None else advantage == 0.0
    assert all(math.isnan(advantage) for advantage in group_relative(rollouts, keep_equal=False))


def test_an_unverified_rollout_has_no_advantage_and_moves_no_mean() -> None:
    advantages = group_relative(_group(0, 1.0, None, 0.0))
    assert advantages[0::2] == [0.5, -0.5] and math.isnan(advantages[1])
    assert not says_nothing(_group(0, 1.0, None, 0.0))


def test_averaged_by_response_every_response_weighs_the_same() -> None:
    advantages, tokens = [0.5, -0.5, math.nan, 0.25], [2, 8, 5, 0]
    scaled = averaged_by_response(advantages, tokens)
    over_tokens = (scaled[0] * 2 + scaled[1] * 8) / (2 + 8)
    assert over_tokens == pytest.approx((0.5 - 0.5) / 2)
    assert scaled[0] * 2 == pytest.approx(-scaled[1] * 8)
    assert math.isnan(scaled[2]) and scaled[3] == 0.25
    assert averaged_by_response([math.nan], [3])[0] is not None and averaged_by_response([], []) == []
