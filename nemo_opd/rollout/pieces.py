"""Rollouts put together from the segments in which they were written, and cut short."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from nemo_opd.types import Finish, Rollout


def continued(before: Rollout, after: Rollout) -> Rollout:
    """`after` was written with all of `before` as its prefix: the same tokens, with what is known of the first ones.

    A generator knows neither who drew the tokens of a prefix nor how probable they were, so author, log-probabilities,
    versions and loss mask of these come from `before`.
    """
    count = len(before.response_ids)
    assert torch.equal(after.response_ids[:count], before.response_ids), "a continuation starts with what it continues"

    def join(first: Tensor, second: Tensor) -> Tensor:
        return torch.cat([first, second[count:]])

    return replace(
        after,
        sampler_logprobs=join(before.sampler_logprobs, after.sampler_logprobs),
        author=join(before.author, after.author),
        policy_version=join(before.policy_version, after.policy_version),
        loss_mask=join(before.loss_mask, after.loss_mask),
    )


def shortened(rollout: Rollout, length: int) -> Rollout:
    """The first `length` tokens, finished by a stop rule, without `best`. The reward, if any, stays that of the whole
    response."""
    assert length <= len(rollout.response_ids), (length, len(rollout.response_ids))
    return replace(
        rollout,
        response_ids=rollout.response_ids[:length],
        sampler_logprobs=rollout.sampler_logprobs[:length],
        author=rollout.author[:length],
        policy_version=rollout.policy_version[:length],
        loss_mask=rollout.loss_mask[:length],
        finish=Finish.STOPPED,
        best=None,
    )
