"""Which responses are begun, and when: with a scorer that remembers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from nemo_opd.config import PrivilegedContext
from nemo_opd.engines.protocols import EarlyScorer
from nemo_opd.teacher.contexts import Reads, SamePrompt, TeacherContext
from nemo_opd.teacher.early import EarlyScores
from nemo_opd.teacher.insertion import Rendered
from nemo_opd.teacher.privileged import Privileged
from nemo_opd.teacher.several import MixedScorer, RoutedContext, RoutedScorer, Routing
from nemo_opd.types import Need, Rollout, ScoreRequest, TeacherNeeds, TeacherScores
from tests.helpers.rollouts import make_prompt, make_rollout

NEEDS = TeacherNeeds(Need.SAMPLED)
SAMPLES = 3


class Scorer:
    """Remembers what was begun."""

    def __init__(self) -> None:
        self.begun: list[ScoreRequest] = []

    def begin(self, request: ScoreRequest, needs: TeacherNeeds) -> None:
        assert needs == NEEDS
        self.begun.append(request)

    def score(self, requests: Sequence[ScoreRequest], needs: TeacherNeeds) -> Iterator[TeacherScores]:
        return iter(())

    def close(self) -> None:
        pass


class Collective:
    """A scorer that cannot begin."""

    def score(self, requests: Sequence[ScoreRequest], needs: TeacherNeeds) -> Iterator[TeacherScores]:
        return iter(())

    def close(self) -> None:
        pass


class OfTheGroup:
    """The others' first tokens, in the order of their numbers, and who asks."""

    reads = Reads.GROUP

    def context_ids(self, rollouts: Sequence[Rollout]) -> list[tuple[int, ...] | None]:
        def others(rollout: Rollout) -> list[Rollout]:
            group = [r for r in rollouts if r.prompt.index == rollout.prompt.index and r.sample != rollout.sample]
            return sorted(group, key=lambda r: r.sample)

        return [(r.sample, *(int(o.response_ids[0]) for o in others(r))) for r in rollouts]


def step(prompts: int = 4) -> list[Rollout]:
    """The rollouts of a step, mixed up."""
    made = [
        replace(make_rollout(index, 3), sample=sample, response_ids=torch.tensor([10 * index + sample, 1, 2]))
        for index in range(prompts)
        for sample in range(SAMPLES)
    ]
    order = torch.randperm(len(made), generator=torch.Generator().manual_seed(5)).tolist()
    return [made[i] for i in order]


def asked(request: ScoreRequest) -> tuple[Any, ...]:
    return request.context_ids, request.response_ids.tolist(), request.teacher


def test_a_response_is_begun_before_the_next_is_there() -> None:
    scorer, rollouts = Scorer(), step()
    early = EarlyScores(scorer, NEEDS, SamePrompt(), None, SAMPLES)
    for count, rollout in enumerate(early.watched(iter(rollouts)), start=1):
        assert rollout is rollouts[count - 1]
        assert len(scorer.begun) == count
    contexts = SamePrompt().context_ids(rollouts)
    expected = [(ids, r.response_ids.tolist(), 0) for ids, r in zip(contexts, rollouts, strict=True)]
    assert [asked(request) for request in scorer.begun] == expected


def test_a_group_is_begun_with_its_last_response_and_an_unfinished_one_never() -> None:
    scorer, rollouts, context = Scorer(), step(), OfTheGroup()
    missing = rollouts.pop()
    early = EarlyScores(scorer, NEEDS, context, None, SAMPLES)
    seen: dict[int, int] = {}
    whole = 0
    for rollout in early.watched(iter(rollouts)):
        seen[rollout.prompt.index] = seen.get(rollout.prompt.index, 0) + 1
        whole += seen[rollout.prompt.index] == SAMPLES
        assert len(scorer.begun) == SAMPLES * whole
    assert whole == 3
    pairs = zip(context.context_ids(rollouts), rollouts, strict=True)
    expected = [(ids, r.response_ids.tolist(), 0) for ids, r in pairs if r.prompt.index != missing.prompt.index]
    assert sorted(map(asked, scorer.begun)) == sorted(expected)


def test_nothing_is_begun_without_a_context_or_a_token_and_an_error_is_left_to_the_step() -> None:
    """The first record lacks the field that others have."""

    class Plain:
        control: Any = None

        def encode(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
            return [tuple(map(ord, text)) for text in texts]

        def render(self, messages: Any, inserted: tuple[int, ...], left: str, right: str) -> Any:
            return Rendered((1,), inserted, (2,))

    slot = PrivilegedContext(field="hint", fallback="mask")
    context = Privileged(slot, Plain(), "answer")  # type: ignore[arg-type]
    hints = [None, None, "a", "b", None]
    rollouts = [make_rollout(index, 3) for index in range(len(hints))]
    rollouts = [
        r if hint is None else replace(r, prompt=replace(r.prompt, meta={"hint": hint}))
        for r, hint in zip(rollouts, hints, strict=True)
    ]
    rollouts.append(replace(rollouts[2], response_ids=torch.zeros(0, dtype=torch.int64)))
    scorer = Scorer()
    assert list(EarlyScores(scorer, NEEDS, context, None, 1).watched(iter(rollouts))) == rollouts
    assert [request.context_ids for request in scorer.begun] == [(1, ord("a"), 2), (1, ord("b"), 2)]


def test_each_teacher_is_asked_about_its_own() -> None:
    first, second, routing = Scorer(), Scorer(), Routing("kind", ["one", "other", "third"])
    context = RoutedContext([SamePrompt()] * 3, routing)
    assert context.reads is Reads.ITSELF
    kinds = ["one", "other", "third", "nobody", "other"]
    rollouts = [
        replace(make_rollout(i, 3), prompt=replace(make_prompt(i), meta={"kind": kind})) for i, kind in enumerate(kinds)
    ]
    routed = RoutedScorer([first, second, Collective()])
    list(EarlyScores(routed, NEEDS, context, routing, 1).watched(iter(rollouts)))
    assert [request.context_ids for request in first.begun] == [rollouts[0].prompt.token_ids]
    assert [request.context_ids for request in second.begun] == [rollouts[i].prompt.token_ids for i in (1, 4)]


def test_all_of_a_mixture_are_asked() -> None:
    first, second = Scorer(), Scorer()
    mixed = MixedScorer([first, Collective(), second], [1.0, 1.0, 1.0])
    list(EarlyScores(mixed, NEEDS, SamePrompt(), None, 1).watched(iter(step())))
    assert len(first.begun) == len(second.begun) == len(step())


def test_who_can_begin() -> None:
    assert isinstance(Scorer(), EarlyScorer) and not isinstance(Collective(), EarlyScorer)


def test_a_context_of_the_whole_step_is_not_begun() -> None:
    class OfTheStep(SamePrompt):
        reads: Any = Reads.STEP

    with pytest.raises(AssertionError):
        EarlyScores(Scorer(), NEEDS, OfTheStep(), None, 1)
    routing = Routing("kind", ["one", "other"])
    contexts: list[TeacherContext] = [SamePrompt(), OfTheStep()]
    assert RoutedContext(contexts, routing).reads is Reads.STEP
