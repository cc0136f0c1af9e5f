"""Teachers on servers begin to score a step's first responses while its last ones are still being written.

A response is begun as soon as this rank knows what its teacher sees: at once where the context is made of the response
alone, with the last response of its prompt where it is made of the group. The step asks for all scores as ever, when
all responses are there, and finds most of them done. An answer belongs to what was asked, context and response, and
not to a place in the step; so no order matters, and what was begun in vain is a little work lost and no wrong number.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from nemo_opd.engines.protocols import EarlyScorer
from nemo_opd.errors import ConfigError
from nemo_opd.teacher.contexts import Reads, TeacherContext
from nemo_opd.teacher.several import Routing
from nemo_opd.types import Rollout, ScoreRequest, TeacherNeeds


class EarlyScores:
    """Looks at rollouts as they finish, and has their scoring begun."""

    def __init__(
        self,
        scorer: EarlyScorer,
        needs: TeacherNeeds,
        context: TeacherContext,
        routing: Routing | None,
        samples_per_prompt: int,
    ) -> None:
        """`samples_per_prompt`: rollouts that make a group whole."""
        assert context.reads is not Reads.STEP, "nothing is known before the step is"
        self._scorer, self._needs, self._context, self._routing = scorer, needs, context, routing
        self._together = samples_per_prompt if context.reads is Reads.GROUP else 1

    def watched(self, rollouts: Iterator[Rollout]) -> Iterator[Rollout]:
        """The same rollouts, this rank's of one step and verified. Several threads may watch one step each."""
        waiting: defaultdict[tuple[int, int], list[Rollout]] = defaultdict(list)
        for rollout in rollouts:
            group = waiting[rollout.prompt.epoch, rollout.prompt.index]
            group.append(rollout)
            if len(group) == self._together:
                self._begin(group)
                group.clear()
            yield rollout

    def _begin(self, group: Sequence[Rollout]) -> None:
        try:
            contexts = self._context.context_ids(group)
            teachers = [0] * len(group) if self._routing is None else self._routing.numbers(group)
        except ConfigError:  # said of these few; the step says it again if it holds for all of its records
            return
        for rollout, context, teacher in zip(group, contexts, teachers, strict=True):
            if context is not None and teacher is not None and len(rollout.response_ids):
                self._scorer.begin(ScoreRequest(0, context, rollout.response_ids, teacher=teacher), self._needs)
