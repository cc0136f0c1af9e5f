"""Held-out accuracy: every rank answers its share of the problems, every rank knows the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nemo_opd.engines.protocols import Generator
from nemo_opd.evaluate.metrics import EvaluationResult, summarise
from nemo_opd.processes import Processes
from nemo_opd.reliability.stop import StopRequest
from nemo_opd.rollout.seeds import derive_seed
from nemo_opd.types import GenerateRequest, Prompt, Sampling
from nemo_opd.verify.base import Verifier

EVALUATION_EPOCH = -1
"""Stands where training has an epoch, so that evaluation never shares a seed with a rollout."""


@dataclass(frozen=True)
class Evaluation:
    """A fixed set of problems, a sampling and a verifier."""

    problems: Sequence[Prompt]
    sampling: Sampling
    samples_per_prompt: int
    verifier: Verifier
    seed: int

    def measure(self, generator: Generator, processes: Processes, stop: StopRequest) -> EvaluationResult | None:
        """avg@k and pass@k over the problems; None when a stop request interrupted it. Collective.

        The same weights and seed give the same answers on any number of processes, up to rounding in the model.
        """
        mine = [self.problems[i] for i in processes.share(len(self.problems))]
        rewards = torch.full((len(mine), self.samples_per_prompt), torch.nan, dtype=torch.float64)
        lengths = torch.zeros_like(rewards)
        row = {prompt.index: number for number, prompt in enumerate(mine)}
        for rollout in generator.generate(self.requests(mine), self.sampling, stop.requested):
            at = row[rollout.prompt.index], rollout.sample
            reward = self.verifier(rollout.text, rollout.prompt)
            rewards[at] = torch.nan if reward is None else reward
            lengths[at] = len(rollout.response_ids)
        if stop.agreed():
            return None
        everyone = torch.cat(processes.gather(rewards.flatten())).view(-1, self.samples_per_prompt)
        length = torch.cat(processes.gather(lengths.flatten())).mean()
        return summarise(everyone.tolist(), mean_length=float(length))

    def requests(self, problems: Sequence[Prompt]) -> list[GenerateRequest]:
        """One request per problem and sample, with the seeds of this evaluation."""
        return [
            GenerateRequest(problem, sample, derive_seed(self.seed, EVALUATION_EPOCH, problem.index, sample))
            for problem in problems
            for sample in range(self.samples_per_prompt)
        ]
