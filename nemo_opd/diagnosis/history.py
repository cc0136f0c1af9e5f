"""What the rules look at: of each metric the run's first steps, the last ones, and the best mean of a window.

The history is plain JSON data that lives in the run's state, so a resumed run goes on deciding as if it had not been
interrupted. Nothing here depends on the rank: metrics are equal on all of them.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

NOT_FINITE = 1e300
"""Stands for a metric that was infinite or not a number, which JSON cannot hold."""
NOISE = 4.0
"""Standard errors by which two means must differ to be called different: a run has thousands of windows."""

Window = Sequence[float]


class History:
    """The windows of a run's metrics.

    Args:
        state: where it is kept; filled in place. ``{}`` for a new run.
        window: last steps that are looked at.
        start_steps: first steps, with which they are compared.
    """

    def __init__(self, state: dict[str, Any], window: int, start_steps: int) -> None:
        self._window, self._start_steps = window, start_steps
        self._start: dict[str, list[float]] = state.setdefault("start", {})
        self._recent: dict[str, list[float]] = state.setdefault("recent", {})
        self._best: dict[str, float] = state.setdefault("best", {})

    def add(self, metrics: Mapping[str, float]) -> None:
        """One step's metrics; a name may come and go."""
        for name, value in metrics.items():
            number = float(value) if math.isfinite(value) else NOT_FINITE
            start, recent = self._start.setdefault(name, []), self._recent.setdefault(name, [])
            if len(start) < self._start_steps:
                start.append(number)
            else:
                recent.append(number)
                del recent[: -self._window]
            if latest := self.latest(name):
                self._best[name] = max(self._best.get(name, -NOT_FINITE), statistics.fmean(latest))

    def start(self, name: str) -> Window | None:
        """The first values, once there are enough of them."""
        start = self._start.get(name, ())
        return start if len(start) == self._start_steps else None

    def recent(self, name: str) -> Window | None:
        """The last values, once there is a whole window of them after the first ones."""
        recent = self._recent.get(name, ())
        return recent if len(recent) == self._window else None

    def latest(self, name: str) -> Window | None:
        """The last values, once there is a window of any; the first ones may be among them."""
        values = [*self._start.get(name, ()), *self._recent.get(name, ())][-self._window :]
        return values if len(values) == self._window else None

    def best(self, name: str) -> float | None:
        """The greatest mean that any window had."""
        return self._best.get(name)

    def medians(self, name: str) -> tuple[float, float] | None:
        """(at the start, recently)"""
        start, recent = self.start(name), self.recent(name)
        return None if start is None or recent is None else (statistics.median(start), statistics.median(recent))

    def means(self, name: str) -> tuple[float, float] | None:
        """(at the start, recently), for shares and rewards, which have no outliers."""
        start, recent = self.start(name), self.recent(name)
        return None if start is None or recent is None else (statistics.fmean(start), statistics.fmean(recent))

    def risen(self, name: str, least: float = 0.0, noise: float = NOISE) -> bool:
        """Is the recent mean above the first one, by `least` and by `noise` standard errors?"""
        return self._moved(name, least, noise, 1.0)

    def fallen(self, name: str, least: float = 0.0) -> bool:
        """Is the recent mean below the first one, by `least` and beyond noise?"""
        return self._moved(name, least, NOISE, -1.0)

    def _moved(self, name: str, least: float, noise: float, sign: float) -> bool:
        start, recent = self.start(name), self.recent(name)
        if start is None or recent is None:
            return False
        difference = sign * (statistics.fmean(recent) - statistics.fmean(start))
        return difference >= least and difference > noise * math.hypot(standard_error(start), standard_error(recent))


def standard_error(values: Window) -> float:
    """Of the mean of a window, from the differences of neighbours: a trend is not noise (von Neumann, 1941)."""
    count = len(values)
    squares = sum((b - a) * (b - a) for a, b in itertools.pairwise(values))
    return math.sqrt(squares / (2 * (count - 1)) / count) if count > 1 else 0.0
