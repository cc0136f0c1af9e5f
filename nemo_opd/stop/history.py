"""The least window means of the last rollouts, and the threshold that they give (KAT, arXiv 2606.09471)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nemo_opd.config import TrapStop


class History:
    """A first-in-first-out list of m in nats, one number per rollout that had a tested window, and a count of steps.

    The same on every rank: all ranks push the same numbers in the same order. Its threshold changes only by a push,
    which happens once a step, so s is frozen within a step.
    """

    def __init__(self, slot: TrapStop) -> None:
        self._slot = slot
        self._lowest: deque[float] = deque(maxlen=slot.history)
        self.steps = 0
        """Steps that were pushed."""

    def __len__(self) -> int:
        return len(self._lowest)

    def threshold(self) -> float | None:
        """s, the `threshold_quantile` of the list; None while the rule is not active yet."""
        if self.steps < self._slot.warmup_steps or len(self) < max(1, self._slot.warmup_samples):
            return None
        return quantile(sorted(self._lowest), self._slot.threshold_quantile)

    def push(self, lowest: Iterable[float | None]) -> None:
        """End a step with its rollouts' m, ordered by (prompt, sample); None is passed over."""
        self._lowest.extend(m for m in lowest if m is not None)
        self.steps += 1

    def state(self) -> dict[str, Any]:
        """Plain JSON data; a float64 survives JSON bit for bit."""
        return {"lowest": list(self._lowest), "steps": self.steps}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave; of a list longer than `history` the newest are kept."""
        self._lowest = deque(state["lowest"], maxlen=self._slot.history)
        self.steps = state["steps"]


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` of `ordered` (ascending, not empty) lies, linear between neighbours: numpy's
    default definition."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
