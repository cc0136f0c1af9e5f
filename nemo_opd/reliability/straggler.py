"""Names a rank that is slower than the others, step after step.

What counts is the time of a rank's own work: writing its share of the rollouts, and its passes over the rows until
ranks add their gradients up. Everybody's time in a section is the slowest one's, so the section's time tells nothing.
A rank is compared with the median of the others of its kind, and named once where it was slower than
`factor` times that in `steps` of the last `window` steps.

Inside of a tensor-parallel group, and between pipeline stages, ranks wait for each other within a pass: there a slow
rank shows as a slow group. On a GPU the time is that in which the processor prepared the work and waited for results.
"""

from __future__ import annotations

import logging
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

from nemo_opd.config import StragglerConfig
from nemo_opd.processes import Processes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Own:
    """A rank's own time in one part of a step."""

    seconds: float
    amount: float = 1.0
    """How much it had to do (what is compared is time per amount); 0: nothing that could be compared."""
    kind: float = 0.0
    """Ranks are compared with those of the same kind."""


class Stragglers:
    """Looks at every step of one attempt; what it saw is not part of the checkpoint, since machines are not."""

    def __init__(self, config: StragglerConfig, processes: Processes) -> None:
        self._config, self._processes = config, processes
        self._slow: dict[tuple[str, int], deque[bool]] = {}
        self.named: dict[tuple[str, int], int] = {}
        """(part, rank) that was named, and the step."""

    def look(self, step: int, own: Mapping[str, Own]) -> dict[str, float]:
        """Metrics of a step; a rank is named in the log of rank 0. The same names on every rank. One all-reduce."""
        if self._processes.size == 1:
            return {}
        told = self._gather(own)
        metrics = {}
        for part in own:
            scores = relative(told[part], self._config.least_seconds)
            worst = max(scores, default=1.0)
            metrics[f"straggler/{part}"] = worst
            for rank, score in enumerate(scores):
                if self._is_named(step, part, rank, score):
                    metrics["straggler/rank"] = float(rank)
        return {**metrics, "straggler/named": float(len(self.named))}

    def _gather(self, own: Mapping[str, Own]) -> dict[str, list[Own]]:
        rank, size = self._processes.rank, self._processes.size
        names = {(part, other): [f"{part} {other} {i}" for i in range(3)] for part in own for other in range(size)}
        flat = {
            name: number if other == rank else 0.0
            for (part, other), three in names.items()
            for name, number in zip(three, astuple(own[part]), strict=True)
        }
        told = self._processes.sum(flat)
        return {part: [Own(*(told[name] for name in names[part, other])) for other in range(size)] for part in own}

    def _is_named(self, step: int, part: str, rank: int, score: float) -> bool:
        config = self._config
        slow = self._slow.setdefault((part, rank), deque(maxlen=config.window))
        slow.append(score > config.factor)
        if (part, rank) in self.named or sum(slow) < config.steps:
            return False
        self.named[part, rank] = step
        if self._processes.is_first:
            log.warning(
                "step %d: rank %d is a straggler: slower than %g times the others in %s, in %d of the last %d steps, "
                "%.1f times in this one; see docs/guards.md",
                *(step, rank, config.factor, part, sum(slow), len(slow), score),
            )
        return True


def relative(told: Sequence[Own], least_seconds: float) -> list[float]:
    """Each rank's time per amount over the median of the others of its kind; 1 where there is nothing to compare, or
    the rank took less than `least_seconds`."""
    scores = []
    for rank, mine in enumerate(told):
        others = [o.seconds / o.amount for i, o in enumerate(told) if i != rank and o.amount and o.kind == mine.kind]
        median = statistics.median(others) if others else 0.0
        comparable = mine.seconds >= least_seconds and mine.amount > 0 and median > 0
        scores.append(mine.seconds / mine.amount / median if comparable else 1.0)
    return scores
