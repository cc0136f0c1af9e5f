"""What is asked of the engines: some responses, and log-probabilities of their tokens. Knows protocols alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_opd.doctor.bounds import Bounds
from nemo_opd.doctor.compare import complete, difference, greedy, same_weights
from nemo_opd.doctor.finding import Finding, Verdict, at_most
from nemo_opd.engines.protocols import Generator, Scorer
from nemo_opd.processes import Processes
from nemo_opd.rollout.exchange import gather_rollouts
from nemo_opd.rollout.source import StudentSource
from nemo_opd.types import Need, Prompt, Rollout, Sampling, ScoreRequest, TeacherNeeds

_ANSWERS_TO = (0,)
"""The first process alone gets answers, and makes findings of them."""


@dataclass(frozen=True)
class Probe:
    """The same sequences for all engines. Its methods are collective; findings come back on the first process."""

    processes: Processes
    prompts: Sequence[Prompt]
    seed: int
    decode: Callable[[Tensor], str]

    def written(self, generator: Generator, sampling: Sampling) -> list[Rollout]:
        """One response to each prompt, known to every process."""
        source = StudentSource(generator, sampling, 1, self.seed)
        mine = [self.prompts[i] for i in self.processes.share(len(self.prompts))]
        return gather_rollouts(self.processes, source.rollouts(mine, 0, lambda: False), self.prompts, self.decode)

    def logprobs(
        self, scorer: Scorer, rollouts: Sequence[Rollout], teacher: int = 0, backwards: bool = False
    ) -> list[Tensor]:
        """float32 [response] of each rollout, NaN where there is none; `backwards` asks in the other order."""
        requests = _requests(rollouts, teacher)
        found = {}
        for answer in scorer.score(requests[::-1] if backwards else requests, TeacherNeeds(Need.SAMPLED)):
            assert answer.sampled_logprobs is not None
            found[answer.key] = answer.sampled_logprobs.cpu().masked_fill(~answer.valid.cpu(), float("nan"))
        return self._all(found, rollouts)

    def best(self, scorer: Scorer, rollouts: Sequence[Rollout]) -> list[Tensor]:
        """[response] of each rollout: the most probable id, NaN where there is none."""
        answers = scorer.score(_requests(rollouts, 0), TeacherNeeds(Need.TOP_K, k=1))
        return self._all({one.key: one.ids[:, 0].cpu().double() for one in answers if one.ids is not None}, rollouts)

    def _all(self, found: dict[int, Tensor], rollouts: Sequence[Rollout]) -> list[Tensor]:
        if not self.processes.is_first:
            return []
        return [found.get(key, torch.full((len(r.response_ids),), float("nan"))) for key, r in enumerate(rollouts)]


def _requests(rollouts: Sequence[Rollout], teacher: int) -> list[ScoreRequest]:
    return [
        ScoreRequest(key, one.prompt.token_ids, one.response_ids, _ANSWERS_TO, teacher=teacher)
        for key, one in enumerate(rollouts)
        if len(one.response_ids)
    ]


def generator_findings(
    probe: Probe, trainer: Scorer, generator: Generator, rollouts: Sequence[Rollout], tokens: int, bounds: Bounds
) -> list[Finding]:
    """The generator's probabilities against the trainer's, of `rollouts` that it drew at temperature 1 and without
    filters; and its greedy responses against the trainer's most probable ids."""
    ours = probe.logprobs(trainer, rollouts)
    greedily = probe.written(generator, Sampling(tokens, greedy=True))
    best = probe.best(trainer, greedily)
    if not probe.processes.is_first:
        return []
    found = difference(ours, [one.sampler_logprobs for one in rollouts])
    way_out = (
        "the generator computes another policy than the one that is trained: compare its weights, rope settings and "
        "dtype (rollout.dtype, student.dtype) with the trainer's"
    )
    agreement = greedy("generator", best, [one.response_ids for one in greedily], bounds, way_out)
    return [*same_weights("generator", found, bounds, way_out), agreement]


def sampling_findings(
    probe: Probe, trainer: Scorer, generator: Generator, sampling: Sampling, corrected: bool
) -> list[Finding]:
    """What temperature, top-k and top-p do to the ratio of trained policy and sampler. `corrected`: the objective looks
    at that ratio."""
    rollouts = probe.written(generator, sampling)
    ours = probe.logprobs(trainer, rollouts)
    if not probe.processes.is_first:
        return []
    found = difference(ours, [one.sampler_logprobs for one in rollouts])
    name = "sampling: mean |difference| by temperature, top-k, top-p"
    bound = "0 for rollouts of the trained policy"
    if corrected:
        return [Finding(name, Verdict.OK, found.mean, "corrected by the importance ratio")]
    way_out = "rollouts are of another distribution than the trained one: set rollout.temperature=1, top_p=1, top_k=0"
    return [Finding(name, Verdict.WARN, found.mean, bound, f"{way_out}, or choose a loss or weight with a ratio")]


def teacher_findings(subject: str, first: Sequence[Tensor], second: Sequence[Tensor], bounds: Bounds) -> list[Finding]:
    """Does a teacher score every token, and the same when it is asked again, in another order?"""
    twice = difference(first, second)
    way_out = "its scores depend on what they are asked together with: look at packing, masks and position ids"
    return [
        complete(subject, twice),
        at_most(f"{subject}: asked twice, mean |difference|", twice.mean, bounds.mean_difference, way_out),
    ]


def reference_findings(
    subject: str, scores: Sequence[Tensor], reference: Sequence[Tensor], bounds: Bounds, way_out: str
) -> list[Finding]:
    """A teacher against another engine with the same weights, on tokens that neither drew."""
    found = difference(scores, reference)
    return same_weights(subject, found, bounds, way_out, ("mean", "largest", "ratios", "positions"))
