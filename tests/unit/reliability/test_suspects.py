"""Which rank is named."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_opd.reliability.heartbeat import Beat
from nemo_opd.reliability.suspects import Watched, find_hang

LIMITS = {"rollout": 100.0, "save": 500.0, "train": 100.0, "between": None}


def _rank(rank: int, section: str, age: float, silence: float = 0.1, **beat: Any) -> Watched:
    return Watched(Beat(rank, "n1", 1, 1, "a", section, **beat), age, silence)


WAITING = {"waits": True, "entry": 5}


@pytest.mark.parametrize(
    ("ranks", "named"),
    [
        ([_rank(0, "rollout", 99), _rank(1, "rollout", 99)], None),
        ([_rank(0, "rollout", 101, **WAITING), _rank(1, "rollout", 101, 50, **WAITING)], (1, "has not run")),
        ([_rank(0, "rollout", 101, **WAITING), _rank(1, "rollout", 101, entry=5)], (1, "waits for no other rank")),
        ([_rank(0, "rollout", 300, **WAITING), _rank(1, "save", 300, entry=4)], None),
        ([_rank(0, "rollout", 501, **WAITING), _rank(1, "save", 501, entry=4)], (1, "waits for no other rank")),
        ([_rank(0, "rollout", 101, **WAITING), _rank(1, "rollout", 101, **WAITING)], None),
        ([_rank(0, "rollout", 104, **WAITING), _rank(1, "rollout", 104, **WAITING)], (0, "all ranks wait")),
        ([_rank(0, "train", 104, waits=True, entry=6), _rank(1, "rollout", 104, **WAITING)], (1, "all ranks wait")),
        ([_rank(0, "rollout", 104, **WAITING), _rank(1, "between", 104, 90, entry=9)], None),
        ([_rank(0, "rollout", 104, entry=7), _rank(1, "rollout", 104, entry=6)], (1, "waits for no other rank")),
    ],
    ids=[
        *("within the limit", "stands still", "is busy", "waits for one that may take longer"),
        *("waits for one that took too long", "all wait: perhaps one was stopped just now", "all wait"),
        *("all wait, one is behind", "stands still where nobody watches", "both are busy, one is behind"),
    ],
)
def test_who_is_named(ranks: list[Watched], named: tuple[int, str] | None) -> None:
    hang = find_hang(ranks, LIMITS, silent_after=3.0)
    if named is None:
        assert hang is None
    else:
        assert hang is not None and hang.rank == named[0] and named[1] in str(hang)


def test_the_message_says_rank_section_age_limit_and_where() -> None:
    ranks = [_rank(0, "train", 130, **WAITING), _rank(1, "train", 130, 20, where="trainer.py:9 x", **WAITING)]
    assert str(find_hang(ranks, LIMITS, 3.0)) == (
        "rank 1 on n1 hangs: 130.0 s in section train, limits.train is 100 s; it has not run for 20 s: a call holds "
        "the interpreter's lock, or it is stopped, last seen in trainer.py:9 x"
    )
    stopped = Watched(ranks[1].beat, 130, 20, stopped=True)
    assert "it has not run for 20 s: it is stopped by a signal" in str(find_hang([stopped], LIMITS, 3.0))


def test_nobody_is_named_where_nobody_is() -> None:
    assert find_hang([], LIMITS, 3.0) is None
