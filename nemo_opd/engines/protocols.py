"""What the loop asks of an engine. One contract test-suite per protocol (tests/contract) runs on every engine.

All methods are collective where an engine spans several processes: every rank calls them in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor

from nemo_opd.types import (
    GenerateRequest,
    Rollout,
    Sampling,
    ScoreRequest,
    StopRequested,
    TeacherNeeds,
    TeacherScores,
    TrainBatch,
    TrainStats,
)

NamedTensor = tuple[str, Tensor]
"""A tensor under its Hugging Face name, whole (not a shard), on the CPU or the engine's device."""


Accepts = Callable[[float, float], bool]
"""Asked with the loss and the global gradient norm, on every rank: is the update to be applied? May be collective."""


@dataclass(frozen=True)
class Place:
    """Where this process stands in the trainer's layout."""

    rank: int
    world_size: int
    data_parallel_rank: int
    data_parallel_size: int
    loss_ranks: tuple[tuple[int, ...], ...]
    """For every data-parallel replica, the global ranks that compute its loss (its last pipeline stage)."""

    @property
    def computes_loss(self) -> bool:
        return self.rank in self.loss_ranks[self.data_parallel_rank]


class Snapshot(Protocol):
    """A trainer's state of one moment on its way into a folder."""

    def write(self) -> Iterator[str]:
        """Write this rank's files and yield the name of each, below the folder, when it is written.

        Not collective, from any thread: the trainer may go on meanwhile.
        """

    def finish(self) -> Sequence[str]:
        """Write what is to be said about all ranks' files; returns the names of what this rank wrote for it.

        Collective, when every rank has written. Whatever is raised is raised after the last collective.
        """


@runtime_checkable
class Trainer(Protocol):
    """The student under training."""

    place: Place

    def train_step(self, batch: TrainBatch, accepts: Accepts | None = None) -> TrainStats:
        """Forward, backward, reduce, clip, update. `batch` is this replica's share.

        An update that `accepts` rejects (None: whose gradient norm is not finite) is left out on every rank: weights,
        the optimizer's moments and a moving average stay as they were, and only the schedule goes on.

        The gradient is that of ``sum over components of (sum of token losses / normaliser)`` over all replicas and
        micro-batches, whatever the layout. Statistics are equal on every rank.
        """

    def export_weights(self) -> Iterator[NamedTensor]:
        """Every weight under its Hugging Face name, one at a time, whole on every rank. Collective: exhaust it."""

    def snapshot(self, folder: Path, background: bool = False) -> Snapshot:
        """Model, optimizer and schedule, to be written into an existing empty folder. Collective.

        With `background` they are copied, so that training may go on before they are written; there is one such
        snapshot at a time. Without, they are written as they are then.
        """

    def load(self, folder: Path) -> None:
        """Read back what a snapshot wrote, possibly under another layout. Collective."""


@runtime_checkable
class Generator(Protocol):
    """Writes responses with the student's current weights."""

    @property
    def version(self) -> int:
        """Policy version of the weights it holds; -1 before the first `load_weights`."""

    def generate(
        self, requests: Sequence[GenerateRequest], sampling: Sampling, stop_requested: StopRequested
    ) -> Iterator[Rollout]:
        """Yield each rollout as it finishes, in any order. Not collective.

        A request's tokens depend on its seed and the weights, not on its neighbours. When `stop_requested()` turns
        true, unfinished rollouts are dropped and the iterator ends.
        """

    def load_weights(self, weights: Iterable[NamedTensor], version: int) -> None:
        """Take all the weights or none: on an error the generator refuses to generate until a complete load.

        Raises ValueError when a name is missing, unknown or of another shape, or when `version` does not grow.
        """

    def close(self) -> None:
        """Free what it holds. Idempotent."""


@runtime_checkable
class Resting(Protocol):
    """A generator that shares the trainer's memory."""

    def rest(self) -> None:
        """Give it up until the next call. No rollout is under way, on any process."""


@runtime_checkable
class Scorer(Protocol):
    """A teacher. What it says may change between steps (a teacher that follows the student), never within one."""

    def score(self, requests: Sequence[ScoreRequest], needs: TeacherNeeds) -> Iterator[TeacherScores]:
        """Score every response at temperature 1; yield to each rank the answers of which it is a consumer.

        Collective: every rank passes the same global list. Rows of an answer that could not be computed come back
        with ``valid`` False. Order is free.
        """

    def close(self) -> None:
        """Free what it holds. Idempotent."""


@runtime_checkable
class EarlyScorer(Scorer, Protocol):
    """A teacher that one rank can ask alone, as it needs none of the run's processes."""

    def begin(self, request: ScoreRequest, needs: TeacherNeeds) -> None:
        """Start on a response of this rank for which `score` will be called with the same context, response and needs;
        key and consumers do not matter. From any thread, not collective. It changes no answer, only when it is there.
        """
