"""The low-divergence trap rule of KAT (arXiv 2606.09471): where does a rollout stop being worth reading on?

A rollout that has drifted beyond recovery gets *low* divergence: the teacher agrees with the degraded text. With
d_t = KL(p_t || q_t) at the t-th written token (t from 1) and a window of W tokens,

    z_t = mean of d over t-W+1 .. t          tested at t = max(W, grace), + stride, + 2 stride, ...
    cut at the start of the first of C consecutive tested windows with z_t < s; known once the last of them is written
    m   = least z_t that was tested; nothing is tested once the cut is known

Grace and stride are not given by the paper; by default every whole window is tested, as in m = min over t >= W of z_t.
A window that contains a token without a score is not tested: it counts neither to m nor to the C, and breaks a
sequence of them. All of it depends on the tokens alone, never on how they were cut into segments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TrapRule:
    """The rule's numbers, in tokens."""

    window: int
    """W"""
    consecutive: int
    """C"""
    grace: int
    """The first tested window ends at this token or later."""
    stride: int
    """Tokens between the ends of two tested windows."""

    def window_means(self, divergence: Tensor) -> Tensor:
        """z at every tested window, float64 [windows]; NaN where a token of the window has no score.

        Args:
            divergence: [tokens] d, in nats; NaN where it is not known.
        """
        first = max(self.window, self.grace)
        if len(divergence) < first:
            return torch.empty(0, dtype=torch.float64)
        missing = divergence.isnan()
        sums = _running_sum(torch.where(missing, 0.0, divergence.double()))
        gaps = _running_sum(missing.long())
        ends = torch.arange(first, len(divergence) + 1, self.stride)
        means = (sums[ends] - sums[ends - self.window]) / self.window
        return torch.where(gaps[ends] == gaps[ends - self.window], means, torch.nan)

    def judge(self, divergence: Tensor, threshold: float | None) -> Verdict:
        """What the rule says of the tokens written so far.

        Args:
            divergence: [tokens] d, in nats; NaN where it is not known.
            threshold: s; None cuts nothing.
        """
        means = self.window_means(divergence)
        cut = None if threshold is None else self._cut(means < threshold)
        if cut is not None:
            means = means[: cut + self.consecutive]
        known = means[~means.isnan()]
        return Verdict(
            kept=None if cut is None else self._end(cut) - self.window,
            detected=None if cut is None else self._end(cut + self.consecutive - 1),
            lowest=float(known.min()) if len(known) else None,
            means=known,
        )

    def _cut(self, below: Tensor) -> int | None:
        """Number of the first of `consecutive` tested windows in a row that are `below` (bool [windows])."""
        if len(below) < self.consecutive:
            return None
        runs = below.unfold(0, self.consecutive, 1).all(1).nonzero()
        return int(runs[0]) if len(runs) else None

    def _end(self, number: int) -> int:
        """The token at which tested window `number` (from 0) ends."""
        return max(self.window, self.grace) + number * self.stride


@dataclass(frozen=True)
class Verdict:
    """What the rule says of one rollout."""

    kept: int | None
    """Tokens before the cut; None without one. 0 where the very first window was the first of the C."""
    detected: int | None
    """Tokens that had to be written before the cut was known."""
    lowest: float | None
    """m, in nats; None where no window was tested"""
    means: Tensor
    """float64 [windows], z of the windows that were tested, in order"""


def _running_sum(values: Tensor) -> Tensor:
    """[values + 1]: the sum of the first 0, 1, 2, ... values, added in order, so that more values change no sum."""
    return torch.cat([values.new_zeros(1), values.cumsum(0)])
