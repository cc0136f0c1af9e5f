"""Prompts and rollouts of steps ahead, without a loop around them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from nemo_opd.processes import Processes
from nemo_opd.rollout.ahead import RolloutsAhead, check_versions
from nemo_opd.types import Prompt, Rollout, StopRequested
from tests.helpers.ranks import RankPool
from tests.helpers.rollouts import make_prompt, make_rollout


class Stream:
    """Prompts 0, 1, 2, ..."""

    def __init__(self) -> None:
        self.position = 0

    def take(self, n: int) -> list[Prompt]:
        self.position += n
        return [make_prompt(index) for index in range(self.position - n, self.position)]

    def state(self) -> dict[str, Any]:
        return {"position": self.position}


class Writer:
    """Remembers which steps were begun; those of `held` are not written before they are let go."""

    def __init__(self, *held: int) -> None:
        self.begun: list[int] = []
        self.finished: list[int] = []
        self.held = {step: threading.Event() for step in held}

    def __call__(
        self, prompts: Sequence[Prompt], step: int, stop_requested: StopRequested, ready: Sequence[Rollout]
    ) -> Iterator[Rollout]:
        self.begun.append(step)
        while step in self.held and not self.held[step].wait(0.01):
            if stop_requested():
                return
        for prompt in prompts:
            yield make_rollout(prompt.index, 3)
        self.finished.append(step)


def ahead(staleness: int, steps: int = 10, stop_requested: StopRequested = lambda: False) -> RolloutsAhead:
    return RolloutsAhead(Stream(), Processes(), stop_requested, 2, staleness, steps)


def indices(rollouts: Iterator[Rollout]) -> list[int]:
    return [rollout.prompt.index for rollout in rollouts]


def eventually(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("rollouts of step")]


def test_without_staleness_nothing_is_begun_before_it_is_asked_for_and_no_thread_runs() -> None:
    draws, writer = ahead(0), Writer()
    for step in range(3):
        prompts, rollouts = draws.draw(writer, step, 2)
        assert [prompt.index for prompt in prompts] == [2 * step, 2 * step + 1]
        assert writer.begun == list(range(step)), "an iterator that nobody reads writes nothing"
        assert indices(rollouts) == [2 * step, 2 * step + 1]
        assert draws.position == {"position": 2 * step + 2}
        assert threads() == []
    prompts, rollouts = draws.draw(writer, 2, 5)
    assert indices(rollouts) == [6, 7, 8, 9, 10], "a step may ask again, for any number"


@pytest.mark.parametrize("staleness", [1, 2, 3])
def test_so_many_steps_are_begun_ahead_and_none_beyond_the_last(staleness: int) -> None:
    draws, writer, steps = ahead(staleness, steps=6), Writer(), 6
    for step in range(steps):
        prompts, rollouts = draws.draw(writer, step, 2)
        begun = min(step + staleness + 1, steps)
        eventually(lambda begun=begun: sorted(writer.finished) == list(range(begun)))
        assert indices(rollouts) == [prompt.index for prompt in prompts] == [2 * step, 2 * step + 1]
        assert draws.position == {"position": 2 * step + 2}, "not where the stream is, which is ahead"
    draws.close()
    assert threads() == []


def test_a_run_that_goes_on_begins_with_the_step_that_is_due() -> None:
    draws, writer = ahead(2), Writer()
    _, rollouts = draws.draw(writer, 4, 2)
    indices(rollouts)
    eventually(lambda: sorted(writer.finished) == [4, 5, 6])
    draws.close()


def test_a_step_does_not_wait_for_those_after_it() -> None:
    draws, writer = ahead(2), Writer(1, 2)
    assert indices(draws.draw(writer, 0, 2)[1]) == [0, 1]
    writer.held[1].set()
    assert indices(draws.draw(writer, 1, 2)[1]) == [2, 3]
    assert "rollouts of step 2" in threads()
    draws.close()
    assert threads() == []
    assert 2 not in writer.finished


def test_a_stop_request_ends_what_is_under_way() -> None:
    asked = threading.Event()
    draws, writer = ahead(1, stop_requested=asked.is_set), Writer(1)
    indices(draws.draw(writer, 0, 2)[1])
    asked.set()
    assert indices(draws.draw(writer, 1, 2)[1]) == []
    draws.close()
    assert threads() == []


def test_closing_twice_is_closing_once() -> None:
    draws = ahead(1)
    indices(draws.draw(Writer(1), 0, 2)[1])
    draws.close()
    draws.close()
    assert threads() == []


def failing(prompts: Sequence[Prompt], step: int, stop_requested: StopRequested, ready: Any) -> Iterator[Rollout]:
    yield make_rollout(prompts[0].index, 3)
    if step == 1:
        raise ValueError("no ink")


def test_what_fails_ahead_is_raised_by_the_step_it_belongs_to() -> None:
    draws = ahead(1)
    assert indices(draws.draw(failing, 0, 2)[1]) == [0]
    with pytest.raises(ValueError, match="no ink"):
        indices(draws.draw(failing, 1, 2)[1])
    draws.close()


def test_a_token_is_no_older_than_the_promise_and_not_from_the_future() -> None:
    versions, mask = torch.tensor([-1, 3, 4, 4, 5, 5]), torch.tensor([True, True, True, False, True, True])
    mixed = replace(make_rollout(7, 6), policy_version=versions, loss_mask=mask)
    given = replace(make_rollout(1, 3), policy_version=torch.full((3,), -1))
    check_versions([given, mixed], version=5, oldest=2)
    check_versions([replace(mixed, loss_mask=versions == 5), given], version=5, oldest=0)
    check_versions([], 0, 0)
    for version, oldest, expected in ((5, 1, "4 to 5"), (4, 2, "2 to 4"), (5, 0, "5 to 5")):
        said = rf"prompt 7, sample 0: got tokens of policy versions \[3, 4, 5\]; expected {expected}, as policy"
        with pytest.raises(RuntimeError, match=said):
            check_versions([given, mixed], version, oldest)


def _fails_on_the_second(rank: int) -> list[str]:
    draws = RolloutsAhead(Stream(), Processes.current(), lambda: False, 2, 1, 10)
    said = []
    for step in range(2):
        _, rollouts = draws.draw(failing if rank == 1 else Writer(), step, 2)
        try:
            indices(rollouts)
        except (ValueError, RuntimeError) as error:
            said.append(f"step {step}, {type(error).__name__}: {error}")
    draws.close()
    return said


def test_all_ranks_hear_of_it(ranks2: RankPool) -> None:
    first, second = ranks2.run(_fails_on_the_second)
    assert second == ["step 1, ValueError: no ink"]
    assert first == ["step 1, RuntimeError: the rollouts of step 1 failed on rank 1: ValueError: no ink"]
