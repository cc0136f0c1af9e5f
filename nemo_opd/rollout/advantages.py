"""From rewards to advantages: how much better a response did than the others of its prompt (the `reward` slot).

    A_i = r_i - mean(r)      or      A_i = (r_i - mean(r)) / (std(r) + eps)           over the G responses of a prompt

GRPO (arXiv 2402.03300, which divides by the standard deviation; arXiv 2503.20783 argues for leaving it out). A group
whose rewards are all the same says nothing about what to prefer: its advantages are 0, or it is left out (arXiv
2503.14476). What has no advantage has NaN, which losses leave out of their sums and of their counts alike.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch

from nemo_opd.config import GroupRelativeReward, SlotConfig
from nemo_opd.types import Rollout

Key = tuple[int, int]
"""(epoch, index) of a prompt."""


def groups(rollouts: Sequence[Rollout]) -> dict[Key, list[int]]:
    """Positions of each prompt's rollouts, in the order of first appearance."""
    found: dict[Key, list[int]] = {}
    for position, rollout in enumerate(rollouts):
        found.setdefault((rollout.prompt.epoch, rollout.prompt.index), []).append(position)
    return found


def says_nothing(rollouts: Sequence[Rollout]) -> bool:
    """Are the rewards of a group all the same? Also where fewer than two were verified."""
    return len({rollout.reward for rollout in rollouts if rollout.reward is not None}) < 2


def group_relative(
    rollouts: Sequence[Rollout], divide_by_std: bool = False, std_eps: float = 1e-6, keep_equal: bool = True
) -> list[float]:
    """The advantage of each rollout over the others of its prompt, in units of the reward (or of its deviation).

    Args:
        divide_by_std: divide by the group's standard deviation (n in its denominator) plus `std_eps`.
        keep_equal: groups of equal rewards get 0 and count; False gives them NaN.

    Returns:
        NaN for a rollout that nothing verified, which takes no part in its group's mean either.
    """
    advantages = [math.nan] * len(rollouts)
    for members in groups(rollouts).values():
        verified = [(i, reward) for i in members if (reward := rollouts[i].reward) is not None]
        rewards = [reward for _, reward in verified]
        if says_nothing([rollouts[i] for i in members]):
            values = [0.0 if keep_equal else math.nan] * len(rewards)
        else:
            mean = statistics.fmean(rewards)
            scale = statistics.pstdev(rewards) + std_eps if divide_by_std else 1.0
            values = [(reward - mean) / scale for reward in rewards]
        for (i, _), value in zip(verified, values, strict=True):
            advantages[i] = value
    return advantages


def averaged_by_response(advantages: Sequence[float], tokens: Sequence[int]) -> list[float]:
    """Advantages scaled so that a mean over all tokens is the mean over responses of each one's mean over its tokens.

    Every response then weighs the same, however long it is. Signs are kept, so clipping a ratio means the same.

    Args:
        tokens: of each response, how many the loss counts.
    """
    pairs = list(zip(advantages, tokens, strict=True))
    counted = [count for advantage, count in pairs if count and not math.isnan(advantage)]
    if not counted:
        return list(advantages)
    mean = sum(counted) / len(counted)
    return [advantage * mean / count if count else advantage for advantage, count in pairs]


def verifier_advantages(slot: SlotConfig, rollouts: Sequence[Rollout]) -> list[float]:
    """The advantages that a recipe's `reward` slot asks for, all rollouts of the step at hand; 0 where it is `none`."""
    if not isinstance(slot, GroupRelativeReward):
        return [0.0] * len(rollouts)
    advantages = group_relative(rollouts, slot.divide_by_std, slot.std_eps, slot.equal_groups == "keep")
    if slot.average == "tokens":
        return advantages
    counts = [int((r.loss_mask & torch.isfinite(r.sampler_logprobs)).sum()) for r in rollouts]
    return averaged_by_response(advantages, counts)


def redraws_of(slot: SlotConfig) -> int:
    """How often a step may go on to further prompts when groups say nothing."""
    return slot.redraws if isinstance(slot, GroupRelativeReward) and slot.equal_groups == "redraw" else 0
