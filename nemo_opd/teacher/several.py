"""Several teachers: each scores the records that name it, or all of them score everything.

Routed, every teacher has a number, requests carry it, and rows are packed teacher by teacher (`PackedRow.teacher`), so
that each meets its own output layer. Mixed, the teachers together are one, whose log-probabilities are

    log q(v) = sum_i w_i log q_i(v)  up to a constant of the position,  w_i >= 0,  sum_i w_i = 1

the normalised geometric mean: since KL(p || q) = sum_i w_i KL(p || q_i) - (what the teachers disagree about among
themselves, which does not depend on p), its gradients for p are exactly those of the weighted sum of reverse KLs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nemo_opd.engines.protocols import EarlyScorer, Scorer
from nemo_opd.errors import ConfigError
from nemo_opd.teacher.contexts import Reads, TeacherContext
from nemo_opd.types import Need, Rollout, ScoreRequest, TeacherNeeds, TeacherScores

log = logging.getLogger(__name__)


class Routing:
    """Which of the named teachers scores a rollout: the one that its record names.

    Args:
        key: field of the records (`data.teacher_key`).
        names: of the teachers; their positions are their numbers.
    """

    def __init__(self, key: str, names: Sequence[str]) -> None:
        self._key, self._numbers = key, {name: number for number, name in enumerate(names)}
        self._known = False
        self._told: set[str] = set()

    def numbers(self, rollouts: Sequence[Rollout]) -> list[int | None]:
        """The teacher's number for each rollout; None where the record names none that exists.

        Raises:
            ConfigError: no record has named a teacher so far, so the key or the names must be wrong.
        """
        named = [rollout.prompt.meta.get(self._key, "") for rollout in rollouts]
        numbers = [self._numbers.get(name) for name in named]
        self._known = self._known or any(number is not None for number in numbers)
        if rollouts and not self._known:
            raise ConfigError(
                "data.teacher_key", f"records whose {self._key} is {' or '.join(map(repr, sorted(set(named))[:3]))}",
                f"one of {', '.join(self._numbers)}", "name another field, or the teachers as the records do",
            )  # fmt: skip
        for name in sorted({n for n, number in zip(named, numbers, strict=True) if number is None} - self._told):
            log.warning("data.teacher_key: no teacher is called %r; such records have none and are counted", name)
            self._told.add(name)
        return numbers

    def metrics(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """Share of a step's rollouts that each teacher scores, by name."""
        numbers = self.numbers(rollouts)
        shares = {name: numbers.count(number) / max(1, len(numbers)) for name, number in self._numbers.items()}
        return {f"teacher/{name}_share": share for name, share in shares.items()}


class RoutedContext:
    """What each rollout's own teacher sees; None where it has no teacher.

    Args:
        contexts: by teacher, each rendered by that teacher's chat template.
    """

    def __init__(self, contexts: Sequence[TeacherContext], routing: Routing) -> None:
        self._contexts, self._routing = contexts, routing

    @property
    def reads(self) -> Reads:
        """See `TeacherContext.reads`."""
        return max(context.reads for context in self._contexts)

    def context_ids(self, rollouts: Sequence[Rollout]) -> list[tuple[int, ...] | None]:
        """See `TeacherContext.context_ids`."""
        answers = [context.context_ids(rollouts) for context in self._contexts]
        numbers = self._routing.numbers(rollouts)
        return [None if number is None else answers[number][i] for i, number in enumerate(numbers)]


class RoutedScorer:
    """`Scorer` of requests that say which teacher they are for, one teacher after the other."""

    def __init__(self, scorers: Sequence[Scorer]) -> None:
        self._scorers = scorers

    def score(self, requests: Sequence[ScoreRequest], needs: TeacherNeeds) -> Iterator[TeacherScores]:
        """See `Scorer.score`. Raises at the call what any of the teachers refuses."""
        parts = [
            scorer.score([request for request in requests if request.teacher == number], needs)
            for number, scorer in enumerate(self._scorers)
        ]
        return (answer for part in parts for answer in part)

    def begin(self, request: ScoreRequest, needs: TeacherNeeds) -> None:
        """See `EarlyScorer.begin`; a teacher that has no such call is left to `score`."""
        scorer = self._scorers[request.teacher]
        if isinstance(scorer, EarlyScorer):
            scorer.begin(request, needs)

    def close(self) -> None:
        """See `Scorer.close`."""
        for scorer in self._scorers:
            scorer.close()


class MixedScorer:
    """`Scorer` whose answers are the weighted geometric mean of several teachers'.

    Sampled log-probabilities are summed with the weights (without the constant that would normalise them). Hidden
    states are put side by side, each times its teacher's weight and in fp32 at least: times the output layers side by
    side they give the weighted sum of the teachers' logits.

    Args:
        weights: positive; divided by their sum.
    """

    def __init__(self, scorers: Sequence[Scorer], weights: Sequence[float]) -> None:
        assert len(scorers) == len(weights) > 0
        self._scorers, self._weights = scorers, [weight / sum(weights) for weight in weights]

    def score(self, requests: Sequence[ScoreRequest], needs: TeacherNeeds) -> Iterator[TeacherScores]:
        """See `Scorer.score`. A row counts where all teachers scored it.

        Raises:
            ValueError: at the call, for a need that a mixture cannot serve: ids that each teacher chooses for itself.
        """
        if needs.need not in (Need.FULL, Need.SAMPLED, Need.NOTHING):
            raise ValueError(f"a mixture of teachers: got {needs.need.name}; expected FULL or SAMPLED")
        return self._answers([scorer.score(requests, needs) for scorer in self._scorers], needs)

    def begin(self, request: ScoreRequest, needs: TeacherNeeds) -> None:
        """See `EarlyScorer.begin`; teachers that have no such call are left to `score`."""
        for scorer in self._scorers:
            if isinstance(scorer, EarlyScorer):
                scorer.begin(request, needs)

    def _answers(self, parts: Sequence[Iterator[TeacherScores]], needs: TeacherNeeds) -> Iterator[TeacherScores]:
        # One teacher after the other: their collectives must not be interleaved, and each answers in its own order.
        collected: dict[int, list[TeacherScores]] = {}
        for part in parts:
            for answer in part:
                collected.setdefault(answer.key, []).append(answer)
        for key, answers in collected.items():
            valid = torch.stack([answer.valid for answer in answers]).all(0)
            if needs.need is Need.FULL:
                yield TeacherScores(key, valid, hidden=self._side_by_side(answers))
            elif needs.need is Need.SAMPLED:
                yield TeacherScores(key, valid, sampled_logprobs=self._sum(answers))
            else:
                yield TeacherScores(key, valid)

    def _side_by_side(self, answers: Sequence[TeacherScores]) -> Tensor:
        hidden = [answer.hidden for answer in answers if answer.hidden is not None]
        scaled = [weight * h.to(_exact(h.dtype)) for weight, h in zip(self._weights, hidden, strict=True)]
        return torch.cat(scaled, dim=1)

    def _sum(self, answers: Sequence[TeacherScores]) -> Tensor:
        found = [answer.sampled_logprobs for answer in answers if answer.sampled_logprobs is not None]
        return torch.stack([weight * values for weight, values in zip(self._weights, found, strict=True)]).sum(0)

    def close(self) -> None:
        """See `Scorer.close`."""
        for scorer in self._scorers:
            scorer.close()


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
