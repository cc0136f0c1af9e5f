"""What a step's rollouts say by themselves, before any model looks at them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_opd.types import Finish, Rollout

_MIX = (-7046029254386353131, 7640891576956012809, 1609587929392839161, -4417276706812531889)
"""Odd 64-bit numbers: their products with the ids of a 3-gram and with its response's number add up to its name."""


def rollout_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Reward, length, ending and repetition of a step's rollouts: means and quantiles over rollouts, lengths in tokens,
    shares in [0, 1]. Every rank knows all rollouts, so the numbers are the same on all of them."""
    if not rollouts:
        return {}
    lengths = torch.tensor([r.response_ids.numel() for r in rollouts], dtype=torch.float64)
    p50, p95 = lengths.quantile(torch.tensor([0.5, 0.95], dtype=torch.float64)).tolist()
    metrics = {
        "response/length": float(lengths.mean()),
        "response/length_p50": p50,
        "response/length_p95": p95,
        "response/length_max": float(lengths.max()),
        "response/eos_share": _share(rollouts, Finish.EOS),
        "response/truncated_share": _share(rollouts, Finish.LENGTH),
    }
    repeated = repeated_3grams([r.response_ids for r in rollouts])
    if repeated is not None:
        metrics["response/repeated_3grams"] = repeated
    rewards = [r.reward for r in rollouts if r.reward is not None]
    if rewards:
        metrics["reward/mean"] = sum(rewards) / len(rewards)
    return metrics


def staleness_metrics(rollouts: Sequence[Rollout], version: int, oldest: int) -> dict[str, float]:
    """By how many optimizer steps the trained tokens that a policy of ours wrote are older than the policy `version`
    that is trained on them: their mean, and the share of each number up to `oldest`, beyond which there is none
    (`nemo_opd.rollout.ahead.check_versions`).

    Nothing where `oldest` is 0.
    """
    if not oldest:
        return {}
    versions = [r.policy_version[r.loss_mask & (r.policy_version >= 0)] for r in rollouts]
    age = version - torch.cat([torch.empty(0, dtype=torch.int64), *versions])
    counts = age.bincount(minlength=oldest + 1).double() / max(1, len(age))
    shares = {f"rollout/staleness_{number}": share for number, share in enumerate(counts.tolist())}
    mean = float(counts @ torch.arange(oldest + 1, dtype=torch.float64))
    return {"rollout/staleness_mean": mean, **shares}


def repeated_3grams(responses: Sequence[Tensor]) -> float | None:
    """Of all 3-grams of token ids, the share that stood earlier in the same response; None where there are none.

    Args:
        responses: int64 [response] each.

    3-grams are told apart by a 64-bit sum of products, for which one sort of the whole step suffices.
    """
    ids = torch.cat([torch.empty(0, dtype=torch.int64), *responses])
    owner = torch.repeat_interleave(torch.tensor([r.numel() for r in responses], dtype=torch.int64))
    if len(ids) < 3:
        return None
    names = sum(ids[i : len(ids) - 2 + i] * _MIX[i] for i in range(3)) + owner[:-2] * _MIX[3]
    names = names[owner[:-2] == owner[2:]]
    return 1.0 - len(names.unique()) / len(names) if len(names) else None


def _share(rollouts: Sequence[Rollout], finish: Finish) -> float:
    return sum(r.finish is finish for r in rollouts) / len(rollouts)
