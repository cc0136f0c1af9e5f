"""Does a teacher's score of whole responses agree with the verifier? Three numbers, with intervals over prompts.

The score of a response is ``sum_t log q(y_t | what the teacher sees, y_<t)`` in nats; successes are what the verifier
gives at least a threshold.

    AUC        probability that a success has a higher score than a failure, over all responses together
    Spearman   rank correlation of score and reward, over all responses together
    pairwise   share of pairs of the *same prompt* with different rewards whose scores are in the same order

Ties count half. The first two also reward a teacher that knows which prompts are easy (and are moved by the lengths of
responses); the third does not. Intervals are percentiles of a bootstrap that draws whole prompts, since responses to
one prompt are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
_LOW, _HIGH = 2.5, 97.5
"""Percentiles of a 95 % interval."""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; NaN where there is nothing to compare."""

    value: float
    low: float
    high: float
    n: int
    """What it was computed from: responses, or pairs."""

    def __str__(self) -> str:
        return "-" if math.isnan(self.value) else f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Agreement:
    """Of one teacher context with the verifier."""

    prompts: int
    responses: int
    successes: int
    auc: Estimate
    spearman: Estimate
    pairwise: Estimate

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; null for what there is nothing to compute from."""
        counts: dict[str, Any] = {name: getattr(self, name) for name in ("prompts", "responses", "successes")}
        for name in ("auc", "spearman", "pairwise"):
            counts[name] = {k: None if v != v else v for k, v in vars(getattr(self, name)).items()}
        return counts


def agreement(
    groups: Mapping[Any, Sequence[tuple[float, float]]], threshold: float = 1.0, draws: int = 1000, seed: int = 0
) -> Agreement:
    """Compare scores with rewards.

    Args:
        groups: by prompt, (score, reward) of its responses.
        threshold: least reward of a success.
        draws: bootstrap samples of prompts.
    """
    parts = [np.asarray(group, dtype=np.float64).reshape(-1, 2) for group in groups.values() if len(group)]
    responses = np.concatenate(parts) if parts else np.zeros((0, 2))
    ordered = np.array([concordance(part) for part in parts]).reshape(-1, 2)
    generator = np.random.default_rng(seed)
    samples = [generator.integers(0, len(parts), len(parts)) for _ in range(draws if parts else 0)]

    def pooled(statistic: Callable[[Array], float]) -> Estimate:
        drawn = [statistic(np.concatenate([parts[i] for i in sample])) for sample in samples]
        return _estimate(statistic(responses), drawn, len(responses))

    shares = [_share(ordered[sample].sum(0)) for sample in samples]
    return Agreement(
        prompts=len(parts),
        responses=len(responses),
        successes=int((responses[:, 1] >= threshold).sum()),
        auc=pooled(lambda rows: auc(rows[:, 0], rows[:, 1] >= threshold)),
        spearman=pooled(lambda rows: spearman(rows[:, 0], rows[:, 1])),
        pairwise=_estimate(_share(ordered.sum(0)), shares, int(ordered[:, 1].sum()) if len(ordered) else 0),
    )


def auc(scores: Array, success: np.ndarray[Any, np.dtype[np.bool_]]) -> float:
    """Mann and Whitney's form of the area under the ROC curve; NaN without both successes and failures."""
    good, bad = int(success.sum()), int((~success).sum())
    if not good or not bad:
        return math.nan
    return float((ranks(scores)[success].sum() - good * (good + 1) / 2) / (good * bad))


def spearman(one: Array, other: Array) -> float:
    """Correlation of the ranks; NaN where one of the two is constant."""
    if len(one) < 2 or (one == one[0]).all() or (other == other[0]).all():
        return math.nan
    return float(np.corrcoef(ranks(one), ranks(other))[0, 1])


def ranks(values: Array) -> Array:
    """1 for the least value; equal values share the mean of their ranks."""
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[index]


def concordance(group: Array) -> tuple[float, int]:
    """(pairs of a prompt's responses in the same order by score and reward, pairs with different rewards)."""
    score, reward = group[:, 0], group[:, 1]
    better = reward[:, None] > reward[None, :]
    same_order = (score[:, None] > score[None, :]) + 0.5 * (score[:, None] == score[None, :])
    return float(same_order[better].sum()), int(better.sum())


def _share(totals: Array) -> float:
    return float(totals[0] / totals[1]) if len(totals) and totals[1] else math.nan


def _estimate(value: float, drawn: Sequence[float], n: int) -> Estimate:
    """Samples in which there was nothing to compare are left out of the interval."""
    known = [sample for sample in drawn if not math.isnan(sample)]
    low, high = np.percentile(known, [_LOW, _HIGH]) if known else (math.nan, math.nan)
    return Estimate(value, float(low), float(high), n)
