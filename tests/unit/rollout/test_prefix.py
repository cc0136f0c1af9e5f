"""Who writes which tokens: teacher's prefixes that shrink, and a share of the data set's responses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
import torch

from nemo_opd.rollout.prefix import MixedSource, PrefixSchedule, TeacherPrefixSource
from nemo_opd.rollout.source import DatasetSource, StudentSource
from nemo_opd.types import Author, Finish, GenerateRequest, Prompt, Rollout, Sampling, StopRequested

EOS = 1


def never() -> bool:
    return False


def prompts(count: int, response: str | None = None) -> list[Prompt]:
    return [Prompt(i, 0, (), (5, 6), response=response) for i in range(count)]


class Writer:
    """A generator that writes one id over and over, and ends with EOS after `ends_after` tokens."""

    version = 3

    def __init__(self, writes: int, ends_after: int = 1000) -> None:
        self.writes, self.ends_after = writes, ends_after
        self.asked: list[GenerateRequest] = []
        self.samplings: list[Sampling] = []

    def generate(
        self, requests: Sequence[GenerateRequest], sampling: Sampling, stop_requested: StopRequested
    ) -> Iterator[Rollout]:
        self.asked += requests
        self.samplings.append(sampling)
        for request in reversed(requests):
            if stop_requested():
                return
            yield self._rollout(request, min(sampling.max_new_tokens, request.max_new_tokens or 1000))

    def _rollout(self, request: GenerateRequest, limit: int) -> Rollout:
        ids = list(request.prefix_ids)
        while len(ids) < limit and EOS not in ids:
            ids.append(EOS if len(ids) == self.ends_after else self.writes)
        begun = len(request.prefix_ids)
        author = torch.tensor([int(request.prefix_author)] * begun + [0] * (len(ids) - begun), dtype=torch.int8)
        return Rollout(
            request.prompt, request.sample, torch.tensor(ids, dtype=torch.int64), torch.zeros(len(ids)), author,
            torch.zeros(len(ids), dtype=torch.int64), torch.ones(len(ids), dtype=torch.bool), Finish.LENGTH,
        )  # fmt: skip

    def load_weights(self, weights: object, version: int) -> None:
        raise AssertionError("nobody loads weights here")

    def close(self) -> None:
        pass


def test_the_largest_prefix_falls_from_the_full_length_to_nothing_along_a_cosine() -> None:
    schedule = PrefixSchedule(longest=100, steps=20, seed=0)
    lengths = [schedule.largest(step) for step in range(25)]
    assert lengths[0] == 100 and lengths[10] == 50 and lengths[20:] == [0] * 5
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[5] == round(50 * (1 + 2**-0.5))
    assert PrefixSchedule(longest=100, steps=1, seed=0).largest(0) == 100


def test_lengths_are_spread_evenly_up_to_the_largest_and_repeat() -> None:
    schedule = PrefixSchedule(longest=9, steps=4, seed=0)
    drawn = [schedule.length(0, prompt, sample) for prompt in prompts(1000) for sample in range(4)]
    counts = Counter(drawn)
    assert set(counts) == set(range(10))
    assert all(count == pytest.approx(400, abs=80) for count in counts.values())  # 19 is one standard deviation
    assert drawn == [schedule.length(0, prompt, sample) for prompt in prompts(1000) for sample in range(4)]
    other = PrefixSchedule(longest=9, steps=4, seed=1)
    assert drawn != [other.length(0, prompt, sample) for prompt in prompts(1000) for sample in range(4)]
    assert {schedule.length(4, prompt, 0) for prompt in prompts(50)} == {0}
    always = PrefixSchedule(longest=9, steps=4, seed=0, uniform=False)
    assert {always.length(0, prompt, 0) for prompt in prompts(50)} == {9}


def source(teacher: Writer, student: Writer, longest: int = 8, steps: int = 4) -> TeacherPrefixSource:
    own = StudentSource(student, Sampling(8, temperature=0.7), 2, seed=0)
    return TeacherPrefixSource(teacher, own, PrefixSchedule(longest, steps, seed=0))


def test_the_teacher_begins_and_the_student_goes_on() -> None:
    teacher, student = Writer(40), Writer(30)
    rollouts = list(source(teacher, student).rollouts(prompts(20), 0, never))
    assert len(rollouts) == 40 and len({(r.prompt.index, r.sample) for r in rollouts}) == 40
    schedule = PrefixSchedule(8, 4, seed=0)
    for rollout in rollouts:
        begun = schedule.length(0, rollout.prompt, rollout.sample)
        assert rollout.response_ids.tolist() == [40] * begun + [30] * (8 - begun)
        assert rollout.author.tolist() == [int(Author.TEACHER)] * begun + [int(Author.STUDENT)] * (8 - begun)
    lengths = Counter(len(r.prefix_ids) for r in student.asked)
    assert lengths[0] > 0 and lengths[8] > 0
    assert all(request.max_new_tokens for request in teacher.asked), "nobody asks for a prefix of no tokens"
    assert [s.temperature for s in teacher.samplings] == [1.0], "the prefix is a sample of the teacher's distribution"


def test_after_the_last_prefix_the_teacher_is_not_asked() -> None:
    teacher, student = Writer(40), Writer(30)
    rollouts = list(source(teacher, student).rollouts(prompts(5), 4, never))
    assert teacher.asked == [] and all((r.author == int(Author.STUDENT)).all() for r in rollouts)


def test_a_prefix_that_ends_the_response_is_the_response() -> None:
    rollouts = source(Writer(40, ends_after=1), Writer(30)).rollouts(prompts(30), 0, never)
    ended = [r.response_ids.tolist() for r in rollouts if r.response_ids[:2].tolist() == [40, EOS]]
    assert ended and all(ids == [40, EOS] for ids in ended)


def test_after_a_stop_request_the_student_is_still_asked_and_writes_nothing() -> None:
    """Its `generate` may be collective: a rank that did not ask would leave the others waiting."""
    asked = iter([False] * 3 + [True] * 9)
    student = Writer(30)
    assert list(source(Writer(40), student).rollouts(prompts(20), 0, lambda: next(asked))) == []
    assert len(student.asked) == 40


def mixed(share: float, student: Writer | None = None, seed: int = 0) -> MixedSource:
    own = StudentSource(student or Writer(30), Sampling(4), 2, seed=seed)
    return MixedSource(own, DatasetSource(lambda text: [7, EOS], 4), share, seed)


def test_a_share_of_the_prompts_is_the_students_whatever_the_rank() -> None:
    source, some = mixed(0.3), prompts(2000, response="written")
    whole = list(source.rollouts(some, 0, never))
    own = {r.prompt.index for r in whole if r.author[0] == int(Author.STUDENT)}
    written = [r for r in whole if r.author[0] == int(Author.DATASET)]
    assert len(own) == pytest.approx(600, abs=82)  # 20.5 is one standard deviation
    assert len(written) == 2000 - len(own) and len(whole) == len(written) + 2 * len(own)
    assert all(r.response_ids.tolist() == [7, EOS] for r in written)
    parts = [r for rank in range(3) for r in source.rollouts(some[rank::3], 5, never)]
    assert {r.prompt.index for r in parts if r.author[0] == int(Author.STUDENT)} == own
    other = {r.prompt.index for r in mixed(0.3, seed=1).rollouts(some, 0, never) if r.author[0] == int(Author.STUDENT)}
    assert own != other


def test_the_ends_of_the_share() -> None:
    some = prompts(50, response="written")
    for share, author in ((0.0, Author.DATASET), (1.0, Author.STUDENT)):
        source = mixed(share)
        assert {int(r.author[0]) for r in source.rollouts(some, 0, never)} == {int(author)}
        assert source.follows_policy == (share > 0)
