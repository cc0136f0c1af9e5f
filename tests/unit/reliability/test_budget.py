"""Stopping before the time is over, with room for a save."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from nemo_opd.processes import Processes
from nemo_opd.reliability.budget import END_VARIABLE, ENDING_SECONDS, GRACE_VARIABLE, SAFETY, TimeBudget
from nemo_opd.reliability.stop import StopRequest
from tests.helpers.ranks import RankPool


class Clock:
    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


def test_the_last_save_and_the_rest_of_a_step_are_kept_free(tmp_path: Path) -> None:
    clock = Clock()
    budget = TimeBudget(tmp_path, 100.0, {}, clock)
    assert budget.reserve == ENDING_SECONDS
    budget.saved(20.0, keep=False)
    budget.stepped(10.0)
    assert budget.reserve == SAFETY * 30.0 + ENDING_SECONDS
    clock.time += 100.0 - budget.reserve - 0.5
    assert budget.used_up() == ""
    clock.time += 1.0
    assert budget.used_up() == "time limit: 50 s are left, 50 s are kept for a save"


@pytest.mark.parametrize(
    ("limit", "end", "seconds"), [(100.0, "1300", 100.0), (None, "1300", 300.0), (400.0, "1300", 300)]
)
def test_the_earlier_of_two_ends_counts(tmp_path: Path, limit: float | None, end: str, seconds: float) -> None:
    clock = Clock()
    budget = TimeBudget(tmp_path, limit, {END_VARIABLE: end}, clock)
    clock.time = 1000.0 + seconds - ENDING_SECONDS - 1
    assert not budget.used_up()
    clock.time += 2
    assert budget.used_up()


def test_without_an_end_there_is_time(tmp_path: Path) -> None:
    clock = Clock()
    budgets = [TimeBudget(tmp_path, None, {END_VARIABLE: "Unknown"}, clock), TimeBudget(now=clock)]
    clock.time = 1e12
    assert [budget.used_up() for budget in budgets] == ["", ""]


def test_the_time_of_a_save_is_remembered_by_the_next_attempt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    TimeBudget(tmp_path).saved(210.0, keep=True)
    for grace, said in (("180", True), ("240", False)):
        budget = TimeBudget(tmp_path, None, {GRACE_VARIABLE: grace}, Clock())
        assert budget.reserve == SAFETY * 210.0 + ENDING_SECONDS
        caplog.clear()
        with caplog.at_level(logging.WARNING, "nemo_opd"):
            budget.warn()
        assert ("the last save took 210 s, but the job has 180 s" in caplog.text) == said


def test_a_damaged_memory_is_none(tmp_path: Path) -> None:
    (tmp_path / "control").mkdir()
    (tmp_path / "control" / "last-save.json").write_text("{")
    assert TimeBudget(tmp_path, 10.0, {}).reserve == ENDING_SECONDS


def _asked(rank: int, folder: str) -> tuple[bool, str]:
    """One rank's time is over a little before the other's: clocks differ."""
    clock = Clock()
    budget = TimeBudget(Path(folder), 100.0, {}, clock)
    clock.time += 99.0 if rank else 0.0
    stop = StopRequest(Path(folder), "a-0", Processes.current(), budget)
    return stop.agreed(), stop.reason


def test_all_ranks_stop_at_the_same_step(ranks2: RankPool, tmp_path: Path) -> None:
    first, second = ranks2.run(_asked, str(tmp_path))
    assert first == (True, "another rank was asked to stop")
    assert second == (True, "time limit: 1 s are left, 5 s are kept for a save")


def test_between_tokens_the_end_is_noticed(tmp_path: Path) -> None:
    clock = Clock()
    stop = StopRequest(tmp_path, "a-0", Processes(), TimeBudget(tmp_path, 100.0, {}, clock))
    assert not stop.requested()
    clock.time += 99.0
    stop._next_look = 0.0  # it looks twice a second
    assert stop.requested()
