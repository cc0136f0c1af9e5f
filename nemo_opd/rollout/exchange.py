"""Rollouts travel between processes as two flat tensors, so that nothing has to be unpickled.

Prompts are not sent: every rank reads the same prompt stream and knows them by position. Nor are texts: they are
decoded from the ids where they are read. `Rollout.best`, hundreds of bytes a token, stays where it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nemo_opd.processes import Processes
from nemo_opd.types import Finish, Prompt, Rollout

_HEADER = 4  # prompt position, sample, length, finish
_INTEGERS = 4  # per token: id, author, policy version, loss mask


def flatten(rollouts: Iterable[tuple[int, Rollout]]) -> tuple[Tensor, Tensor]:
    """(prompt position in the step, rollout) pairs -> int64 [any], float64 [any].

    Float64 keeps the reward exact; the sampler's float32 log-probabilities pass through it unchanged.
    """
    integers: list[Tensor] = []
    floats: list[Tensor] = []
    for position, rollout in rollouts:
        length = len(rollout.response_ids)
        integers.append(torch.tensor([position, rollout.sample, length, int(rollout.finish)]))
        integers += [
            rollout.response_ids.long(), rollout.author.long(), rollout.policy_version.long(), rollout.loss_mask.long()
        ]  # fmt: skip
        floats.append(torch.tensor([math.nan if rollout.reward is None else rollout.reward], dtype=torch.float64))
        floats.append(rollout.sampler_logprobs.double())
    if not integers:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.float64)
    return torch.cat(integers), torch.cat(floats)


def unflatten(
    integers: Tensor, floats: Tensor, prompts: Sequence[Prompt], decode: Callable[[Tensor], str]
) -> list[Rollout]:
    """The inverse of `flatten`, given the step's prompts."""
    rollouts = []
    i = f = 0
    while i < integers.numel():
        position, sample, length, finish = integers[i : i + _HEADER].tolist()
        i += _HEADER
        ids, author, version, mask = integers[i : i + _INTEGERS * length].view(_INTEGERS, length)
        i += _INTEGERS * length
        reward = float(floats[f])
        rollouts.append(
            Rollout(
                prompt=prompts[position],
                sample=sample,
                response_ids=ids.clone(),
                sampler_logprobs=floats[f + 1 : f + 1 + length].float(),
                author=author.to(torch.int8),
                policy_version=version.clone(),
                loss_mask=mask.bool(),
                finish=Finish(finish),
                decode=decode,
                reward=None if math.isnan(reward) else reward,
            )
        )
        f += 1 + length
    return rollouts


def gather_rollouts(
    processes: Processes, mine: Iterable[Rollout], prompts: Sequence[Prompt], decode: Callable[[Tensor], str]
) -> list[Rollout]:
    """Every rank's rollouts on every rank, ordered by (prompt position, sample) whoever wrote them.

    Args:
        mine: the rollouts that this rank wrote, in any order.
        prompts: the step's prompts, the same on every rank.
        decode: int64 [response] -> text.
    """
    position = {(prompt.epoch, prompt.index): p for p, prompt in enumerate(prompts)}

    def place(rollout: Rollout) -> int:
        return position[rollout.prompt.epoch, rollout.prompt.index]

    mine = list(mine)
    best = {(place(rollout), rollout.sample): rollout.best for rollout in mine if rollout.best is not None}
    integers, floats = flatten((place(rollout), rollout) for rollout in mine)
    parts = zip(processes.gather(integers), processes.gather(floats), strict=True)
    everyone = [rollout for i, f in parts for rollout in unflatten(i, f, prompts, decode)]
    everyone = [replace(rollout, best=best.get((place(rollout), rollout.sample))) for rollout in everyone]
    return sorted(everyone, key=lambda rollout: (place(rollout), rollout.sample))
