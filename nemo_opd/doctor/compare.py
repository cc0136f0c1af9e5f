"""Two engines' log-probabilities of the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_opd.doctor.bounds import BETTER, RATIO_HIGH, RATIO_LOW, Bounds
from nemo_opd.doctor.finding import Finding, Verdict, at_least, at_most

_FIRST_RANGE, _GROWTH = 16, 4


@dataclass(frozen=True)
class Difference:
    """Of log p (one engine) from log m (the other), over tokens that both gave a number for."""

    tokens: int
    missing: int
    """Tokens without a number from one of them."""
    mean: float
    """Of |log p - log m|, nats."""
    largest: float
    kl: float
    """Estimate of KL(m || p) from tokens drawn from m: mean of r - 1 - log r with r = p / m, never below 0 (Schulman,
    "Approximating KL divergence", 2020: k3)."""
    outside: float
    """Share of tokens with p / m outside [0.8, 1.25]."""
    ranges: tuple[tuple[int, int, float], ...]
    """(first offset, one beyond the last, mean |difference|): response offsets 0-15, 16-63, 64-255, ..."""

    @property
    def worst_range(self) -> float:
        return max((mean for _, _, mean in self.ranges), default=float("nan"))

    def by_position(self) -> str:
        """``0-15: 1e-07, 16-63: 2e-07``"""
        return ", ".join(f"{first}-{end - 1}: {mean:.2g}" for first, end, mean in self.ranges)


def difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Difference:
    """Compare log-probabilities response by response.

    Args:
        ours: log p, [response] each, NaN where there is none.
        theirs: log m of the same tokens; the k3 estimate is right where they were drawn from m.
    """
    if not ours:
        nan = float("nan")
        return Difference(0, 0, nan, nan, nan, nan, ())
    delta = torch.cat([p.double() - m.double() for p, m in zip(ours, theirs, strict=True)])
    offset = torch.cat([torch.arange(len(p)) for p in ours])
    known = ~delta.isnan()
    delta, offset = delta[known], offset[known]
    ratio = delta.exp()
    outside = (ratio < RATIO_LOW) | (ratio > RATIO_HIGH)
    return Difference(
        tokens=len(delta),
        missing=int((~known).sum()),
        mean=float(delta.abs().mean()),
        largest=float(delta.abs().max()) if len(delta) else float("nan"),
        kl=float((ratio - 1 - delta).mean()),
        outside=float(outside.double().mean()),
        ranges=tuple(_ranges(delta.abs(), offset)),
    )


def _ranges(size: Tensor, offset: Tensor) -> list[tuple[int, int, float]]:
    found, first, end = [], 0, _FIRST_RANGE
    while len(offset) and first <= int(offset.max()):
        inside = (offset >= first) & (offset < end)
        if inside.any():
            found.append((first, end, float(size[inside].mean())))
        first, end = end, end * _GROWTH
    return found


ROWS = ("tokens", "mean", "largest", "kl", "ratios", "positions")


def same_weights(
    subject: str, found: Difference, bounds: Bounds, way_out: str, rows: Sequence[str] = ROWS
) -> list[Finding]:
    """Rows about two engines that hold the same weights; `rows`: which of `ROWS`."""
    mean, ratios, largest = bounds.mean_difference, bounds.outside_share, bounds.largest_difference
    every = {
        "tokens": complete(subject, found),
        "mean": at_most(f"{subject}: mean |difference| of log p", found.mean, mean, way_out, better=mean * BETTER),
        "largest": at_most(f"{subject}: largest |difference|", found.largest, largest, way_out, above=Verdict.WARN),
        "kl": at_most(f"{subject}: KL", found.kl, bounds.kl, way_out, better=bounds.kl * BETTER),
        "ratios": at_most(f"{subject}: ratios outside [0.8, 1.25]", found.outside, ratios, way_out),
        "positions": _positions(subject, found, bounds),
    }
    return [every[name] for name in rows]


def complete(subject: str, found: Difference) -> Finding:
    """Did every token get a number?"""
    name, bound = f"{subject}: tokens compared", "all that were written"
    count = f"{found.tokens} of {found.tokens + found.missing}"
    if found.tokens and not found.missing:
        return Finding(name, Verdict.OK, count, bound)
    return Finding(name, Verdict.FAIL, count, bound, "tokens without a number train nothing; see the log of the engine")


def _positions(subject: str, found: Difference, bounds: Bounds) -> Finding:
    grows = found.worst_range > bounds.mean_difference >= found.mean
    way_out = "it grows or jumps with the position: compare the two engines' rope settings and position ids"
    bound = f"each at most {bounds.mean_difference:g}"
    verdict = Verdict.WARN if grows else Verdict.OK
    return Finding(f"{subject}: by position", verdict, found.by_position(), bound, way_out if grows else "")


def greedy(subject: str, best: Sequence[Tensor], written: Sequence[Tensor], bounds: Bounds, way_out: str) -> Finding:
    """Share of one engine's greedy tokens that are the other's most probable ones too; both int64 [response] each."""
    same = [b == w for b, w in zip(best, written, strict=True) if len(w)]
    share = float(torch.cat(same).double().mean()) if same else float("nan")
    return at_least(f"{subject}: greedy agreement", share, bounds.greedy_agreement, way_out)
