"""Where responses come from: the `prefix` slot. A source turns this rank's prompts into rollouts, as they finish."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import torch

from nemo_opd.engines.protocols import Generator
from nemo_opd.errors import ConfigError
from nemo_opd.rollout.seeds import derive_seed
from nemo_opd.types import Author, Finish, GenerateRequest, Prompt, Rollout, Sampling, StopRequested


class RolloutSource(Protocol):
    """Writes the responses of a step."""

    @property
    def follows_policy(self) -> bool:
        """Does the student write, so that its generator wants the new weights after a step?"""

    def rollouts(
        self, prompts: Sequence[Prompt], step: int, stop_requested: StopRequested, ready: Sequence[Rollout] = ()
    ) -> Iterator[Rollout]:
        """Every sample of every prompt, in any order; fewer when a stop was requested. `step` counts from 0.

        What the student wrote before and is `ready`, for these prompts or others, it does not write again.
        """


@dataclass(frozen=True)
class StudentSource:
    """The student writes every token (`prefix: student`)."""

    generator: Generator
    sampling: Sampling
    samples_per_prompt: int
    seed: int
    follows_policy: bool = True

    def rollouts(
        self, prompts: Sequence[Prompt], step: int, stop_requested: StopRequested, ready: Sequence[Rollout] = ()
    ) -> Iterator[Rollout]:
        there = {name_of(rollout): rollout for rollout in ready}
        requests = self.requests(prompts)
        missing = [request for request in requests if name_of(request) not in there]
        handed_on = [there[name_of(request)] for request in requests if name_of(request) in there]
        return chain(handed_on, self.written(missing, stop_requested))

    def requests(self, prompts: Sequence[Prompt]) -> list[GenerateRequest]:
        """One for each sample of each prompt."""
        return [
            GenerateRequest(prompt, sample, derive_seed(self.seed, prompt.epoch, prompt.index, sample))
            for prompt in prompts
            for sample in range(self.samples_per_prompt)
        ]

    def written(self, requests: Sequence[GenerateRequest], stop_requested: StopRequested) -> Iterator[Rollout]:
        """The student's responses to requests, which may hold a prefix."""
        return self.generator.generate(requests, self.sampling, stop_requested)


@dataclass(frozen=True)
class DatasetSource:
    """The data set wrote the whole response (`prefix: dataset`), which makes the loop an SFT loop."""

    encode_response: Callable[[str], Sequence[int]]
    """Response text -> token ids, EOS included."""
    max_new_tokens: int
    follows_policy: bool = False

    def rollouts(
        self, prompts: Sequence[Prompt], step: int, stop_requested: StopRequested, ready: Sequence[Rollout] = ()
    ) -> Iterator[Rollout]:
        for prompt in prompts:
            if prompt.response is None:
                raise ConfigError(
                    "data.response_key",
                    f"no response in record {prompt.index}",
                    "a written response in every record",
                    "name the right key, or choose prefix=student to let the student write",
                )
            ids = torch.tensor(list(self.encode_response(prompt.response)), dtype=torch.int64)
            whole = len(ids) <= self.max_new_tokens
            yield dataset_rollout(prompt, ids[: self.max_new_tokens], Finish.EOS if whole else Finish.LENGTH)


def dataset_rollout(prompt: Prompt, ids: torch.Tensor, finish: Finish) -> Rollout:
    """A response that no policy of ours wrote: no sampler log-probabilities, every token trained on."""
    count = len(ids)
    return Rollout(
        prompt=prompt,
        sample=0,
        response_ids=ids,
        sampler_logprobs=torch.full((count,), math.nan),
        author=torch.full((count,), int(Author.DATASET), dtype=torch.int8),
        policy_version=torch.full((count,), -1),
        loss_mask=torch.ones(count, dtype=torch.bool),
        finish=finish,
        decode=lambda _: prompt.response or "",
    )


def name_of(written: GenerateRequest | Rollout) -> tuple[int, int, int]:
    """Epoch, index, sample: what tells a response from all others of a run."""
    return written.prompt.epoch, written.prompt.index, written.sample
