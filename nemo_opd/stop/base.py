"""What the loop asks of a stop rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from nemo_opd.engines.protocols import Generator
from nemo_opd.types import Rollout


@dataclass(frozen=True)
class StopReport:
    """What a rule did in a step, equal on every rank."""

    discarded: int = 0
    """Tokens that were written and are in none of the step's rollouts any more."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Flat names."""


class StopRule(Protocol):
    """Ends rollouts before EOS or the token limit: while they are written, or afterwards."""

    def writer(self, generator: Generator) -> Generator:
        """Who writes the rollouts of training steps: `generator`, or one that asks the rule as it goes.

        `generate` of the latter is collective: every rank calls it equally often and exhausts it.
        """

    def cut(self, rollouts: Sequence[Rollout], contexts: Sequence[tuple[int, ...] | None]) -> list[Rollout]:
        """The step's rollouts as they are scored and trained on, given all of them and what the teacher sees.
        Collective; every rank passes the same."""

    def end_step(self) -> StopReport:
        """Called once after the step's update: take the step's rollouts into the state, say what was done."""

    def state(self) -> dict[str, Any]:
        """All that decides how the rule goes on, as plain JSON data; the same on every rank."""

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""


class NoStop:
    """A rollout ends at EOS or at `rollout.max_new_tokens` (`stop: default`)."""

    def writer(self, generator: Generator) -> Generator:
        return generator

    def cut(self, rollouts: Sequence[Rollout], contexts: Sequence[tuple[int, ...] | None]) -> list[Rollout]:
        return list(rollouts)

    def end_step(self) -> StopReport:
        return StopReport()

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        pass
