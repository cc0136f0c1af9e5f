"""Which rank is called a straggler, on made-up times."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import Any

import pytest

from nemo_opd.config import StragglerConfig
from nemo_opd.processes import Processes
from nemo_opd.reliability.straggler import Own, Stragglers, relative
from tests.helpers.figures import record
from tests.helpers.ranks import RankPool

DELAYED_FROM = 100


class _Told(Processes):
    """All ranks in one process: what they would have told each other is made up."""

    table: dict[str, list[Own]]

    @classmethod
    def of(cls, size: int) -> Any:
        told = cls(0, size)
        object.__setattr__(told, "table", {})
        return told

    def sum(self, values: Any) -> dict[str, float]:
        parts = {name: (own.seconds, own.amount, own.kind) for name, own in self._flat()}
        return {name: parts[name.rpartition(" ")[0]][int(name.rpartition(" ")[2])] for name in values}

    def _flat(self) -> Any:
        return [(f"{part} {rank}", own) for part, ranks in self.table.items() for rank, own in enumerate(ranks)]


def _named(ranks: int, steps: int, times: Callable[[int, int], Own], **settings: Any) -> dict[tuple[str, int], int]:
    told = _Told.of(ranks)
    stragglers = Stragglers(StragglerConfig(**settings), told)
    for step in range(1, steps + 1):
        told.table["rollout"] = [times(step, rank) for rank in range(ranks)]
        stragglers.look(step, {"rollout": told.table["rollout"][0]})
    return stragglers.named


@pytest.mark.parametrize("ranks", [2, 3, 8, 64])
def test_a_rank_that_is_three_times_slower_is_named_within_ten_steps_and_no_other(ranks: int) -> None:
    rng = random.Random(0)
    slow = ranks - 1

    def times(step: int, rank: int) -> Own:
        return Own(rng.lognormvariate(0, 0.15) * (3 if rank == slow and step > DELAYED_FROM else 1))

    named = _named(ranks, 200, times)
    assert list(named) == [("rollout", slow)]
    assert 0 < named["rollout", slow] - DELAYED_FROM <= 10


@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_two_hundred_steps_of_equal_ranks_name_nobody(ranks: int) -> None:
    """Noise of single steps, and a step now and then that takes a rank ten times as long."""
    rng = random.Random(1)

    def times(step: int, rank: int) -> Own:
        return Own(rng.lognormvariate(0, 0.3) * (10 if rng.random() < 0.05 else 1))

    assert _named(ranks, 200, times) == {}
    record("R11", f"false alarms in 200 simulated steps of {ranks} ranks", "0")


def test_what_is_compared_is_time_per_amount_among_ranks_of_a_kind() -> None:
    assert relative([Own(1.0, 10), Own(2.0, 20), Own(3.0, 10)], 0.0) == pytest.approx([0.5, 0.5, 3.0])
    assert relative([Own(1.0, kind=1), Own(9.0, kind=2)], 0.0) == [1.0, 1.0], "stages that do different things"
    assert relative([Own(1.0, 1), Own(1.0, 0)], 0.0) == [1.0, 1.0], "a rank without work is no measure"
    assert relative([Own(0.01), Own(0.001)], 0.05) == [1.0, 1.0], "too short to be judged"
    assert relative([Own(0.1), Own(0.0)], 0.05) == [1.0, 1.0]


def _look(rank: int) -> tuple[list[dict[str, float]], list[str]]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("nemo_opd.reliability.straggler").addHandler(handler)
    stragglers = Stragglers(StragglerConfig(steps=2, window=3), Processes.current())
    own = {"rollout": Own(1.0 + 2 * rank, 4.0), "train": Own(1.0, 7.0)}
    metrics = [stragglers.look(step, own) for step in (1, 2, 3)]
    logging.getLogger("nemo_opd.reliability.straggler").removeHandler(handler)
    return metrics, said


def test_ranks_tell_each_other_and_say_it_once(ranks2: RankPool) -> None:
    (first, said), (second, silent) = ranks2.run(_look)
    assert first == second
    assert [line.get("straggler/rank") for line in first] == [None, 1.0, None]
    assert [line["straggler/named"] for line in first] == [0.0, 1.0, 1.0]
    assert (first[0]["straggler/rollout"], first[0]["straggler/train"]) == (3.0, 1.0)
    assert silent == []
    assert said == [
        "step 2: rank 1 is a straggler: slower than 1.5 times the others in rollout, in 2 of the last 2 steps, "
        "3.0 times in this one; see docs/guards.md"
    ]


def test_one_process_has_nobody_to_be_compared_with() -> None:
    assert Stragglers(StragglerConfig(), Processes()).look(1, {"train": Own(1.0)}) == {}
