"""A second frozen model beside the teacher: the one that the teacher was trained from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from nemo_opd.engines.protocols import Scorer
from nemo_opd.types import Need, ScoreRequest, TeacherNeeds, TeacherScores


class WithBase:
    """`Scorer` that adds the base's log-probability of each written token to the teacher's answer, for losses that ask.

    Both read the same context. A token that one of them did not score is no token of the other's either.
    """

    def __init__(self, teacher: Scorer, base: Scorer) -> None:
        self._teacher, self._base = teacher, base

    def score(self, requests: Sequence[ScoreRequest], needs: TeacherNeeds) -> Iterator[TeacherScores]:
        """See `Scorer.score`. The base goes first, as it answers numbers and the teacher may answer hidden states."""
        if not needs.base:
            return self._teacher.score(requests, needs)
        base = self._base.score(requests, TeacherNeeds(Need.SAMPLED))
        return _merged(base, self._teacher.score(requests, needs))

    def close(self) -> None:
        """See `Scorer.close`."""
        self._teacher.close()
        self._base.close()


def _merged(base: Iterator[TeacherScores], teacher: Iterator[TeacherScores]) -> Iterator[TeacherScores]:
    """One after the other, not in turns: both are collective."""
    beside = {answer.key: answer for answer in base}
    for answer in teacher:
        known = beside[answer.key]
        yield replace(answer, valid=answer.valid & known.valid, base_logprobs=known.sampled_logprobs)
