"""What a step's rollouts say by themselves, before any model looks at them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nemo_opd.types import Finish, Rollout


def rollout_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Reward, length and ending of a step's rollouts: means over rollouts; lengths in tokens, shares in [0, 1]."""
    if not rollouts:
        return {}
    lengths = torch.tensor([len(r.response_ids) for r in rollouts], dtype=torch.float64)
    rewards = [r.reward for r in rollouts if r.reward is not None]
    metrics = {
        "response/length": float(lengths.mean()),
        "response/length_max": float(lengths.max()),
        "response/eos_share": _share(rollouts, Finish.EOS),
        "response/truncated_share": _share(rollouts, Finish.LENGTH),
    }
    if rewards:
        metrics["reward/mean"] = sum(rewards) / len(rewards)
    return metrics


def _share(rollouts: Sequence[Rollout], finish: Finish) -> float:
    return sum(r.finish is finish for r in rollouts) / len(rollouts)
