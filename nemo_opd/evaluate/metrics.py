"""avg@k and pass@k over verified samples, each with its n and a 95 % interval.

The interval is Wilson's, which holds its coverage near 0 and 1 where mean +- 1.96 standard errors does not, for the
number of independent trials that the samples are worth (`effective_trials`). Plain Python, without torch.

    avg@k   mean over problems of the share of right samples
    pass@k  mean over problems of 1 - C(n - c, k) / C(n, k), with c right ones of n samples: the unbiased estimate of
            the probability that at least one of k samples is right (Chen et al. 2021, arXiv 2107.03374, equation 1)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

Z_95 = 1.959963984540054
"""97.5 % quantile of the standard normal distribution."""


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its 95 % interval, all in [0, 1].

    Example: ``str(Estimate("avg@1", 0.873, 0.84, 0.9, 512, 1))`` is ``avg@1 87.3 % [84.0, 90.0] (n=512)``.
    """

    name: str
    value: float
    low: float
    high: float
    problems: int
    """Problems that the mean is over."""
    samples_per_problem: int

    def __str__(self) -> str:
        samples = f" x {self.samples_per_problem} samples" if self.samples_per_problem > 1 else ""
        return (
            f"{self.name} {100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}] "
            f"(n={self.problems}{samples})"
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        return asdict(self)


def avg_at_k(rewards: Sequence[Sequence[float]]) -> Estimate:
    """The mean reward: avg@k for k samples of every problem.

    Args:
        rewards: [problems][k], each in [0, 1]; the same k for every problem.

    Raises:
        ValueError: no problems, no samples, differing numbers of samples, or a reward outside [0, 1] or missing.
    """
    k = _samples_per_problem(rewards)
    means = [sum(row) / k for row in rewards]
    return mean_over_problems(f"avg@{k}", means, k)


def pass_at_k(rewards: Sequence[Sequence[float]], k: int, threshold: float = 1.0) -> Estimate:
    """The unbiased pass@k (Chen et al. 2021).

    Args:
        rewards: [problems][n] with n >= k; the same n for every problem.
        threshold: a sample is right from this reward on.

    Raises:
        ValueError: as `avg_at_k`, or k outside 1 .. n.
    """
    n = _samples_per_problem(rewards)
    if not 1 <= k <= n:
        raise ValueError(f"k: got {k}; expected 1 to {n}, the samples of a problem; draw more samples")
    chances = [pass_chance(n, sum(r >= threshold for r in row), k) for row in rewards]
    return mean_over_problems(f"pass@{k}", chances, n)


def pass_chance(n: int, c: int, k: int) -> float:
    """Chance that k of n samples, drawn without replacement, contain one of the c right ones: 1 - C(n-c, k) / C(n, k).

    In exact integers, then one division: no cancellation for any n.
    """
    assert 0 <= c <= n and 1 <= k <= n, (n, c, k)
    total = math.comb(n, k)
    return (total - math.comb(n - c, k)) / total


def wilson_interval(share: float, n: float, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval (Wilson 1927) for a share seen in n independent trials; n need not be whole."""
    weight = z * z / n
    centre = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / n + weight / (4 * n)) / (1 + weight)
    # At the ends the formula gives exactly 0 and 1 up to rounding, and an interval contains its estimate.
    return min(max(0.0, centre - half), share), max(min(1.0, centre + half), share)


def effective_trials(values: Sequence[float], samples: int) -> float:
    """Independent right-or-wrong trials that would know as much about the mean as these per-problem values do.

    Samples of one problem resemble each other, so the problem is the unit that varies independently: n is the number
    for which p(1-p)/n equals the measured variance of the mean over problems, s^2 / problems. This is the effective
    sample size of surveys, with which Wilson's interval keeps its coverage for clustered data (Franco, Little, Louis
    and Slud 2019). One sample per problem gives the number of problems, and so the plain interval; samples that always
    agree within a problem give nearly that; independent samples give problems x samples, which is also the cap,
    since a variance smaller than that is luck. Where all problems agree on 0 or 1 the variance says nothing, and the
    number of problems is taken.

    Args:
        values: [problems], in [0, 1].
        samples: of each problem.
    """
    n = len(values)
    mean = sum(values) / n
    if samples == 1 or n == 1 or mean in (0.0, 1.0):
        return n
    variance = sum((v - mean) ** 2 for v in values) / (n - 1)
    most = n * samples
    return most if variance * most <= mean * (1 - mean) * n else mean * (1 - mean) * n / variance


def mean_over_problems(name: str, values: Sequence[float], samples: int) -> Estimate:
    """The mean of per-problem `values` (in [0, 1], at least one), each worth `samples` samples."""
    mean = sum(values) / len(values)
    low, high = wilson_interval(mean, effective_trials(values, samples))
    return Estimate(name, mean, low, high, len(values), samples)


def _samples_per_problem(rewards: Sequence[Sequence[float]]) -> int:
    if not rewards:
        raise ValueError("rewards: got no problems; expected at least one; check evaluate.path and evaluate.problems")
    counts = {len(row) for row in rewards}
    if len(counts) > 1 or 0 in counts:
        raise ValueError(f"rewards: got {sorted(counts)} samples per problem; expected one number, at least 1")
    if not all(0 <= r <= 1 for row in rewards for r in row):  # also false for NaN
        raise ValueError("rewards: got one outside [0, 1]; expected the verifier's numbers; leave unverified ones out")
    return counts.pop()
