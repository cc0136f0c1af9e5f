"""What the teacher sees before the response: the `context` slot."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Protocol

from nemo_opd.types import Rollout


class Reads(enum.IntEnum):
    """Which rollouts of a step a rollout's context is made of."""

    ITSELF = 0
    """The rollout alone: its prompt, its record."""
    GROUP = 1
    """All rollouts of its prompt."""
    STEP = 2
    """Those of other prompts too."""


class TeacherContext(Protocol):
    """Gives the teacher's prompt for each rollout of a step."""

    @property
    def reads(self) -> Reads:
        """`context_ids` says the same of rollouts with fewer others beside them, as long as these are there."""

    def context_ids(self, rollouts: Sequence[Rollout]) -> list[tuple[int, ...] | None]:
        """Token ids that stand before each response in the teacher's sequence; all rollouts of the step are at hand.

        None: no teacher signal for this rollout. Its tokens are not scored, take no part in the loss and are counted.
        The same on every rank.
        """


class SamePrompt:
    """The teacher sees what the student saw (`context: same_prompt`)."""

    reads = Reads.ITSELF

    def context_ids(self, rollouts: Sequence[Rollout]) -> list[tuple[int, ...] | None]:
        return [rollout.prompt.token_ids for rollout in rollouts]
