"""The prompts of a step with their rollouts, of which those of the next steps are written while one trains.

With a staleness of k the rollouts of steps n + 1 .. n + k are under way while step n trains. A step's are begun by the
draw of the step k before it, with the weights of that step at the oldest: no token is older than k optimizer steps.

What is finished and not trained on is a checkpoint's (`kept.py`): a resumed run begins with it.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from nemo_opd.processes import Processes
from nemo_opd.rollout.kept import KeptRollouts, gather_kept
from nemo_opd.rollout.source import name_of
from nemo_opd.types import Prompt, Rollout, StopRequested

log = logging.getLogger(__name__)

Write = Callable[[Sequence[Prompt], int, StopRequested, Sequence[Rollout]], Iterator[Rollout]]
"""(prompts of all ranks, their step from 0, stop requested?, rollouts of all ranks that are there already) -> this
rank's share of the rollouts, as they finish.

For a step ahead it is called and exhausted in a thread of its own, so there it must not be collective."""

_END_SECONDS = 30.0
"""In which a thread must have seen that its rollouts are not wanted any more. It verifies to the end what it is at."""


class Prompts(Protocol):
    """`nemo_opd.prompts.stream.PromptStream`."""

    def take(self, n: int) -> list[Prompt]: ...

    def state(self) -> dict[str, Any]: ...


def check_versions(rollouts: Sequence[Rollout], version: int, oldest: int) -> None:
    """Refuse what is beyond the promise: tokens for training that a policy of ours wrote are at most `oldest` steps
    older than the policy `version` that is trained on them, and none is newer.

    Raises RuntimeError, which names the versions; alike on every rank, as every rank knows all rollouts.
    """
    for rollout in rollouts:
        versions = rollout.policy_version[rollout.loss_mask & (rollout.policy_version >= 0)].unique().tolist()
        if versions and not version - oldest <= versions[0] <= versions[-1] <= version:
            raise RuntimeError(
                f"prompt {rollout.prompt.index}, sample {rollout.sample}: got tokens of policy versions {versions}; "
                f"expected {max(0, version - oldest)} to {version}, as policy {version} is trained on them and "
                f"rollout.staleness with rollout.refit_every lets tokens be {oldest} steps old; whoever wrote them "
                "missed a set of weights"
            )


class RolloutsAhead:
    """Hands out steps in order: their prompts, each taken from the stream once, and rollouts.

    Every rank holds one and calls it alike.
    """

    def __init__(
        self,
        prompts: Prompts,
        processes: Processes,
        stop_requested: StopRequested,
        prompts_per_step: int,
        staleness: int,
        steps: int,
        earlier: KeptRollouts | None = None,
    ) -> None:
        """
        Args:
            steps: of the run: none is begun that it will not come to.
            earlier: what an attempt before this one finished and did not train on.
        """
        self._prompts, self._processes, self._stop_requested = prompts, processes, stop_requested
        self._prompts_per_step, self._staleness, self._steps = prompts_per_step, staleness, steps
        self._earlier = earlier or KeptRollouts()
        self._begun: deque[_Begun] = deque()
        self._due: _Begun | None = None
        """Handed out last: not trained on before the next is asked for."""
        self._packed = 0
        """Rollouts of this rank that the last checkpoint holds."""
        self._closed = False
        self.position = prompts.state()
        """Of the stream, after the prompts that were handed out last; those that were taken ahead lie behind it."""

    def draw(self, write: Write, step: int, count: int) -> tuple[list[Prompt], Iterator[Rollout]]:
        """The next `count` prompts, for the step with this number from 0, and this rank's share of their rollouts.

        With a staleness above 0 it is called once for each step, with `count` the prompts of a step, and the iterator
        is collective at its end: what `write` raised on one rank, all ranks raise.
        """
        if not self._staleness:
            prompts = self._prompts.take(count)
            self.position = self._prompts.state()
            return prompts, write(prompts, step, self._stop_requested, self._earlier.take(prompts, step))
        assert count == self._prompts_per_step
        for ahead in range(step + len(self._begun), min(step + self._staleness + 1, self._steps)):
            prompts = self._prompts.take(count)
            ready = self._earlier.take(prompts, ahead)
            self._begun.append(_Begun(prompts, ahead, self._prompts.state(), write, self._unwanted, ready))
        self._due = due = self._begun.popleft()
        assert due.step == step, (due.step, step)
        self.position = due.position
        return due.prompts, due.rollouts(self._processes)

    def kept(self, step: int) -> bytes:
        """For a checkpoint made when the step with this number is due: what all ranks finished for it and for steps
        after it. Nothing where there is nothing. Collective; also after `close`."""
        if not (begun := self._untrained(step)):
            return self._earlier.packed([])
        mine = [rollout for one in begun for rollout in one.written()]
        self._packed = len(mine)
        finished = gather_kept(self._processes, mine, [prompt for one in begun for prompt in one.prompts])
        names = {name_of(rollout) for rollout in finished}
        handed_out = (rollout for one in begun for rollout in one.ready)
        return self._earlier.packed([*finished, *(rollout for rollout in handed_out if name_of(rollout) not in names)])

    def finished_more(self, step: int) -> bool:
        """Did this rank finish something since `kept` was last asked for, for the step that is due or after it?"""
        return sum(len(one.written()) for one in self._untrained(step)) > self._packed

    def close(self) -> None:
        """Break off what is under way; what is finished can still be kept. Idempotent."""
        self._closed = True
        for begun in self._begun:
            begun.end()

    def _untrained(self, step: int) -> list[_Begun]:
        return [one for one in (self._due, *self._begun) if one is not None and one.step >= step]

    def _unwanted(self) -> bool:
        return self._closed or self._stop_requested()


@dataclass(frozen=True)
class _End:
    failure: BaseException | None


class _Begun:
    """A step's rollouts, collected by a thread."""

    def __init__(
        self,
        prompts: list[Prompt],
        step: int,
        position: dict[str, Any],
        write: Write,
        stop_requested: StopRequested,
        ready: list[Rollout],
    ) -> None:
        self.prompts, self.step, self.position, self.ready = prompts, step, position, ready
        self._collected: list[Rollout] = []
        self._end: _End | None = None
        self._news = threading.Condition()
        name, arguments = f"rollouts of step {step}", (write, stop_requested)
        self._thread = threading.Thread(target=self._collect, args=arguments, name=name, daemon=True)
        self._thread.start()

    def _collect(self, write: Write, stop_requested: StopRequested) -> None:
        failure = None
        try:
            for rollout in write(self.prompts, self.step, stop_requested, self.ready):
                with self._news:
                    self._collected.append(rollout)
                    self._news.notify()
        except BaseException as error:  # noqa: BLE001 - belongs to the loop, which gets it with the rollouts
            failure = error
        with self._news:
            self._end = _End(failure)
            self._news.notify()

    def written(self) -> list[Rollout]:
        """What this rank has finished by now, without what was there already."""
        there = {name_of(rollout) for rollout in self.ready}
        return [rollout for rollout in list(self._collected) if name_of(rollout) not in there]

    def rollouts(self, processes: Processes) -> Iterator[Rollout]:
        """As they finish; then all ranks agree, with one small gather, whether a thread failed, and raise if so."""
        count, end = 0, None
        while end is None:
            with self._news:
                while len(self._collected) == count and self._end is None:
                    self._news.wait()
                fresh, end = self._collected[count:], self._end
            yield from fresh
            count += len(fresh)
        self._thread.join()
        failure = end.failure
        reasons = processes.gather_text("" if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        for rank, reason in enumerate(reasons):
            if reason:
                raise RuntimeError(f"the rollouts of step {self.step} failed on rank {rank}: {reason}")

    def end(self) -> None:
        """Wait for a thread that was told to end."""
        self._thread.join(_END_SECONDS)
        if self._thread.is_alive():
            log.warning("the %s are still under way", self._thread.name)
