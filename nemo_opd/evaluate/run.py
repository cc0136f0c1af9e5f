"""Held-out accuracy: every rank answers its share of the problems, every rank knows the result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nemo_opd.engines.protocols import Generator
from nemo_opd.errors import ConfigError
from nemo_opd.evaluate.metrics import Estimate, avg_at_k, pass_at_k
from nemo_opd.processes import Processes
from nemo_opd.reliability.stop import StopRequest
from nemo_opd.rollout.seeds import derive_seed
from nemo_opd.types import GenerateRequest, Prompt, Sampling
from nemo_opd.verify.base import Verifier

EVALUATION_EPOCH = -1
"""Stands where training has an epoch, so that evaluation never shares a seed with a rollout."""


@dataclass(frozen=True)
class EvaluationResult:
    """Accuracy over problems. Example: ``avg@1 87.3 % [84.0, 90.0] (n=512), mean length 31.2 tokens``."""

    estimates: tuple[Estimate, ...]
    """avg@k for k samples, then pass@1, 2, 4, ... up to k when there are several samples"""
    mean_length: float
    """tokens"""
    unverified: int
    """Problems left out because a sample had no reward (no reference, no grader)."""

    @classmethod
    def of(cls, rewards: Sequence[Sequence[float]], mean_length: float) -> EvaluationResult:
        """From rewards [problems][samples]; NaN marks a sample without one.

        Raises:
            ConfigError: no problem could be verified.
        """
        whole = [row for row in rewards if not any(math.isnan(reward) for reward in row)]
        if not whole:
            raise ConfigError(
                "evaluate.path",
                f"{len(rewards)} problems without a single verified answer",
                "problems with answers that verify.name can read",
                "check data.answer_key and verify.name",
            )
        samples = len(whole[0])
        powers = [2**i for i in range(samples.bit_length())] if samples > 1 else []
        estimates = (avg_at_k(whole), *(pass_at_k(whole, k) for k in powers))
        return cls(estimates, mean_length, len(rewards) - len(whole))

    def __str__(self) -> str:
        left_out = f", {self.unverified} problems left out as unverifiable" if self.unverified else ""
        return ", ".join(map(str, self.estimates)) + f", mean length {self.mean_length:.1f} tokens{left_out}"

    def metrics(self) -> dict[str, float]:
        """Flat numbers for metrics.jsonl and TensorBoard."""
        return {
            **{f"evaluation/{e.name}": e.value for e in self.estimates},
            **{f"evaluation/{e.name}_{end}": getattr(e, end) for e in self.estimates for end in ("low", "high")},
            "evaluation/problems": float(self.estimates[0].problems),
            "evaluation/unverified": float(self.unverified),
            "evaluation/length": self.mean_length,
        }

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, for a file of its own."""
        return {
            "estimates": [estimate.as_dict() for estimate in self.estimates],
            "mean_length": self.mean_length,
            "unverified": self.unverified,
        }


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
            assert bool((rollout.policy_version == generator.version).all()), "an answer of other weights"
            at = row[rollout.prompt.index], rollout.sample
            reward = self.verifier(rollout.text, rollout.prompt)
            rewards[at] = torch.nan if reward is None else reward
            lengths[at] = len(rollout.response_ids)
        if stop.agreed():
            return None
        everyone = torch.cat(processes.gather(rewards.flatten())).view(-1, self.samples_per_prompt)
        length = torch.cat(processes.gather(lengths.flatten())).mean()
        return EvaluationResult.of(everyone.tolist(), mean_length=float(length))

    def requests(self, problems: Sequence[Prompt]) -> list[GenerateRequest]:
        """One request per problem and sample, with the seeds of this evaluation."""
        return [
            GenerateRequest(problem, sample, derive_seed(self.seed, EVALUATION_EPOCH, problem.index, sample))
            for problem in problems
            for sample in range(self.samples_per_prompt)
        ]
