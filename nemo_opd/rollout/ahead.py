"""The prompts of a step with their rollouts, of which those of the next steps are written while one trains.

With a staleness of k the rollouts of steps n + 1 .. n + k are under way while step n trains. A step's are begun by the
draw of the step k before it, with the weights of that step at the oldest: no token is older than k optimizer steps.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from nemo_opd.processes import Processes
from nemo_opd.types import Prompt, Rollout, StopRequested

log = logging.getLogger(__name__)

Write = Callable[[Sequence[Prompt], int, StopRequested], Iterator[Rollout]]
"""(prompts of all ranks, their step from 0, stop requested?) -> this rank's share of the rollouts, as they finish.

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
    ) -> None:
        """`steps` of the run: none is begun that it will not come to."""
        self._prompts, self._processes, self._stop_requested = prompts, processes, stop_requested
        self._prompts_per_step, self._staleness, self._steps = prompts_per_step, staleness, steps
        self._begun: deque[_Begun] = deque()
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
            return prompts, write(prompts, step, self._stop_requested)
        assert count == self._prompts_per_step
        for ahead in range(step + len(self._begun), min(step + self._staleness + 1, self._steps)):
            prompts = self._prompts.take(count)
            self._begun.append(_Begun(prompts, ahead, self._prompts.state(), write, self._unwanted))
        due = self._begun.popleft()
        assert due.step == step, (due.step, step)
        self.position = due.position
        return due.prompts, due.rollouts(self._processes)

    def close(self) -> None:
        """Break off what is under way. Idempotent."""
        self._closed = True
        while self._begun:
            self._begun.popleft().end()

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
    ) -> None:
        self.prompts, self.step, self.position = prompts, step, position
        self._collected: queue.SimpleQueue[Rollout | _End] = queue.SimpleQueue()  # never more than the step's
        name, arguments = f"rollouts of step {step}", (write, stop_requested)
        self._thread = threading.Thread(target=self._collect, args=arguments, name=name, daemon=True)
        self._thread.start()

    def _collect(self, write: Write, stop_requested: StopRequested) -> None:
        failure = None
        try:
            for rollout in write(self.prompts, self.step, stop_requested):
                self._collected.put(rollout)
        except BaseException as error:  # noqa: BLE001 - belongs to the loop, which gets it with the rollouts
            failure = error
        self._collected.put(_End(failure))

    def rollouts(self, processes: Processes) -> Iterator[Rollout]:
        """As they finish; then all ranks agree, with one small gather, whether a thread failed, and raise if so."""
        while not isinstance(item := self._collected.get(), _End):
            yield item
        self._thread.join()
        failure = item.failure
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
