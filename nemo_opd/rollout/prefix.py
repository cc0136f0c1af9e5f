"""Responses that the student does not write alone: a teacher's prefix, or a share of the data set's responses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from nemo_opd.engines.protocols import Generator
from nemo_opd.rollout.seeds import derive_uniform
from nemo_opd.rollout.source import DatasetSource, StudentSource, name_of
from nemo_opd.types import Author, GenerateRequest, Prompt, Rollout, Sampling, StopRequested


@dataclass(frozen=True)
class PrefixSchedule:
    """How long a teacher's prefix is.

    The largest length falls from `longest` to 0 along half a cosine, ``longest (1 + cos(pi step / steps)) / 2``. A
    response's own length is drawn uniformly between 0 and the largest: were it always the largest, the first steps
    would have no token of the student's at all, and each step only one depth from which the student takes over.
    """

    longest: int
    """Tokens, at step 0."""
    steps: int
    """The step from which on there are no prefixes."""
    seed: int
    uniform: bool = True
    """False takes the largest length always."""

    def largest(self, step: int) -> int:
        """Of the step with this number, from 0; the nearest whole number of tokens."""
        progress = min(1.0, step / self.steps)
        return round(0.5 * self.longest * (1.0 + math.cos(math.pi * progress)))

    def length(self, step: int, prompt: Prompt, sample: int) -> int:
        """Of one response; the same on every rank and after any resume."""
        largest = self.largest(step)
        if not self.uniform:
            return largest
        return int(derive_uniform("prefix length", self.seed, prompt.epoch, prompt.index, sample) * (largest + 1))


@dataclass(frozen=True)
class TeacherPrefixSource:
    """The teacher writes a prefix at temperature 1, the student goes on (`prefix: teacher`).

    Both write in this process, the teacher first for all of this rank's responses. A prefix that ends the response, or
    fills it, leaves nothing to the student. After a stop request prefixes may be missing; the student's generator is
    asked all the same, since its `generate` may be collective, and ends at once.
    """

    teacher: Generator
    student: StudentSource
    schedule: PrefixSchedule
    follows_policy: bool = True

    def rollouts(
        self, prompts: Sequence[Prompt], step: int, stop_requested: StopRequested, ready: Sequence[Rollout] = ()
    ) -> Iterator[Rollout]:
        requests = self.student.requests(prompts)
        prefixes = self._prefixes(requests, step, stop_requested)
        begun = [replace(r, prefix_ids=prefixes.get(name_of(r), ()), prefix_author=Author.TEACHER) for r in requests]
        return self.student.written(begun, stop_requested)

    def _prefixes(
        self, requests: Sequence[GenerateRequest], step: int, stop_requested: StopRequested
    ) -> dict[tuple[int, int, int], tuple[int, ...]]:
        """The teacher's tokens by response, without the responses that get none."""
        lengths = [self.schedule.length(step, request.prompt, request.sample) for request in requests]
        wanted = [replace(r, max_new_tokens=n) for r, n in zip(requests, lengths, strict=True) if n]
        if not wanted:
            return {}
        written = self.teacher.generate(wanted, Sampling(max(lengths)), stop_requested)
        return {name_of(rollout): tuple(rollout.response_ids.tolist()) for rollout in written}


@dataclass(frozen=True)
class MixedSource:
    """The student writes to a share of the prompts, the data set wrote to the others (`prefix: mixed`, GKD).

    Which, a prompt's place in the data set and the run's seed decide: the same on any number of ranks. A prompt of the
    data set's gives one response, however many samples the student draws to a prompt.
    """

    student: StudentSource
    dataset: DatasetSource
    on_policy_share: float
    seed: int

    @property
    def follows_policy(self) -> bool:
        return self.on_policy_share > 0.0

    def student_writes(self, prompt: Prompt) -> bool:
        return derive_uniform("on policy", self.seed, prompt.epoch, prompt.index) < self.on_policy_share

    def rollouts(
        self, prompts: Sequence[Prompt], step: int, stop_requested: StopRequested, ready: Sequence[Rollout] = ()
    ) -> Iterator[Rollout]:
        own = [prompt for prompt in prompts if self.student_writes(prompt)]
        yield from self.dataset.rollouts([p for p in prompts if not self.student_writes(p)], step, stop_requested)
        yield from self.student.rollouts(own, step, stop_requested, ready)
