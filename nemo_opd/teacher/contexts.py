"""What the teacher sees before the response: the `context` slot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from nemo_opd.types import Rollout


class TeacherContext(Protocol):
    """Gives the teacher's prompt for each rollout of a step."""

    def context_ids(self, rollouts: Sequence[Rollout]) -> list[tuple[int, ...] | None]:
        """Token ids that stand before each response in the teacher's sequence; all rollouts of the step are at hand.

        None: no teacher signal for this rollout. Its tokens are not scored, take no part in the loss and are counted.
        The same on every rank.
        """


class SamePrompt:
    """The teacher sees what the student saw (`context: same_prompt`)."""

    def context_ids(self, rollouts: Sequence[Rollout]) -> list[tuple[int, ...] | None]:
        return [rollout.prompt.token_ids for rollout in rollouts]
