"""Rollouts made by hand, for tests of what happens after they were written."""

from __future__ import annotations

from dataclasses import replace

import torch

from nemo_opd.types import Finish, Prompt, Rollout


def make_prompt(index: int, length: int = 3, epoch: int = 0) -> Prompt:
    return Prompt(
        index=index,
        epoch=epoch,
        messages=({"role": "user", "content": f"problem {index}"},),
        token_ids=tuple(range(1, length + 1)),
        answer=str(index),
    )


def make_rollout(
    index: int, length: int, sample: int = 0, prompt_length: int = 3, reward: float | None = None
) -> Rollout:
    generator = torch.Generator().manual_seed(1000 * index + sample)
    return Rollout(
        prompt=make_prompt(index, prompt_length),
        sample=sample,
        response_ids=torch.randint(4, 40, (length,), generator=generator),
        sampler_logprobs=-torch.rand(length, generator=generator),
        author=torch.zeros(length, dtype=torch.int8),
        policy_version=torch.full((length,), 7),
        loss_mask=torch.rand(length, generator=generator) > 0.3,
        finish=Finish.EOS,
        reward=reward,
    )


def saying(rollout: Rollout, text: str) -> Rollout:
    """The same with a text that has nothing to do with its ids."""
    return replace(rollout, decode=lambda _: text)
