"""The rule of the guard, on made-up runs, and its one decision on all ranks."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from typing import Any

import pytest

from nemo_opd.config import GuardConfig
from nemo_opd.processes import Processes
from nemo_opd.reliability.guard import Guard, threshold
from tests.helpers.figures import record
from tests.helpers.ranks import RankPool

STEPS = 600
HIT = 300
"""Step at which something happens."""


def _guard(state: dict[str, Any] | None = None, **settings: Any) -> Guard:
    return Guard(GuardConfig(**settings), {} if state is None else state, Processes())


def _rejected(what: Callable[[int, float], float], **settings: Any) -> tuple[list[int], str, int]:
    """Steps whose update is rejected, why the run stopped, and at which step."""
    rng, guard, rejected = random.Random(0), _guard(**settings), []
    for step in range(STEPS):
        norm = what(step, rng.gauss(1.5, 0.15))
        if not guard.accepts(0.5 + 0.05 * rng.random(), norm):
            rejected.append(step)
        if guard.stop:
            return rejected, guard.stop, step
    return rejected, "", STEPS


def _at(values: dict[int, float]) -> Callable[[int, float], float]:
    return lambda step, norm: values.get(step, norm)


@pytest.mark.parametrize(
    ("values", "rejected"),
    [
        ({}, []),
        ({HIT: math.nan}, [HIT]),
        ({HIT: math.inf}, [HIT]),
        ({HIT: 1e9}, [HIT]),
        ({HIT: 1e9, HIT + 10: 1e6}, [HIT, HIT + 10]),
        ({3: math.nan}, [3]),
        ({3: 1e9}, []),
    ],
    ids=["nothing", "nan", "inf", "1e9", "1e9, then 1e6 ten steps later", "nan at once", "a spike before any history"],
)
def test_what_is_rejected(values: dict[int, float], rejected: list[int]) -> None:
    found = _rejected(_at(values))
    assert found == (rejected, "", STEPS)
    what = ", ".join(f"{value:g}" for value in values.values())
    record("R7", f"gradient norm {what or 'as usual'}: rejected of {STEPS} updates", str(len(found[0])))


def test_a_level_that_stays_higher_stops_the_run_at_the_fifth() -> None:
    rejected, reason, step = _rejected(lambda step, norm: norm + 2 * (step >= HIT))
    assert rejected == list(range(HIT, HIT + 5)) and step == HIT + 4
    record("R7", "a level that stays higher: the run stops at the rejected update number", str(len(rejected)))
    assert reason.startswith("guard: 5 updates in a row were rejected, the last because the gradient norm ")


def test_a_drift_is_followed_and_a_falling_loss_never_rejected() -> None:
    assert _rejected(lambda step, norm: norm * (1 + step / 50))[0] == []
    guard = _guard()
    assert all(guard.accepts(5.0 * math.exp(-step / 100), 1.0) for step in range(STEPS))


def test_the_loss_is_watched_too_and_a_negative_one_is_none_the_worse() -> None:
    rng, guard = random.Random(0), _guard()
    assert all(guard.accepts(rng.gauss(-0.2, 0.1), 1.0) for _ in range(100))
    assert not guard.accepts(3.0, 1.0)
    assert guard.last.reason.startswith("the loss 3 is above ")
    assert not guard.accepts(math.nan, 1.0) and guard.last.broken


def test_small_numbers_and_zeros_are_no_spikes() -> None:
    """Responses that say nothing give exact zeros; the first that says something must count."""
    guard = _guard()
    assert all(guard.accepts(0.0, 0.0) for _ in range(200))
    assert all(guard.accepts(2.0, 30.0) for _ in range(40)), "zeros are no history"
    guard = _guard()
    assert all(guard.accepts(1e-9, 1e-6) for _ in range(200))
    assert guard.accepts(0.09, 0.9)


def test_without_spikes_only_what_is_not_finite_is_rejected_and_without_a_limit_nothing_stops() -> None:
    assert _rejected(_at({HIT: 1e9}), spikes=False)[0] == []
    rejected, reason, _ = _rejected(lambda step, norm: math.nan if step >= HIT else norm, max_in_a_row=None)
    assert (len(rejected), reason) == (STEPS - HIT, "")


def test_an_accepted_update_ends_a_row() -> None:
    broken = {HIT + i: math.nan for i in range(10) if i != 4}
    assert _rejected(_at(broken))[2] == HIT + 9, "4, one that counts, then 5"


def test_it_goes_on_from_a_stored_state_as_if_nothing_had_been() -> None:
    rng = random.Random(1)
    values = [(rng.random(), rng.lognormvariate(0, 1.0) * (50 if i % 37 == 36 else 1)) for i in range(300)]
    whole, state = _guard(), {}
    expected = [whole.judge(*pair) for pair in values]
    assert any(judged.reason for judged in expected)
    first = _guard(state)
    parts = [first.judge(*pair) for pair in values[:151]]
    resumed = _guard(json.loads(json.dumps(state)))
    assert parts + [resumed.judge(*pair) for pair in values[151:]] == expected


def test_the_bound_has_a_least_spread() -> None:
    assert threshold([2.0] * 50, 6.0, 0.1) == pytest.approx(2.0 + 6 * 0.2)
    assert threshold([1.0, 3.0] * 50, 6.0, 0.1) == pytest.approx(2.0 + 6 * 1.0)


def _decide(rank: int) -> list[tuple[bool, str, list[float]]]:
    state: dict[str, Any] = {}
    guard = Guard(GuardConfig(min_history=2), state, Processes.current())
    told = []
    for number in ([1.0, 1.0], [1.5, 1.5], [1.2, math.nan], [1.0, 1e9], [1.0, 1.0 + 1e-9]):
        accepted = guard.accepts(0.5, number[rank])
        told.append((accepted, "nan" if guard.last.broken else guard.last.reason, list(state["gradient norm"])))
    return told


def test_ranks_that_see_different_numbers_decide_alike(ranks2: RankPool) -> None:
    first, second = ranks2.run(_decide)
    assert first == second
    assert [accepted for accepted, *_ in first] == [True, True, False, False, True]
    assert first[-1][2] == [1.0, 1.5, 1.0 + 1e-9]
