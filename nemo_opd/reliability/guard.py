"""One decision on every update, by all ranks together and before it is applied: does it count, or is it left out?

An update is rejected where its loss or gradient norm is not finite, or far above what was usual:

    x > mean + sigmas * max(deviation, least_spread * |mean|)       and x above the least value that can be a spike

over a window of the last *accepted* values. A rejected value never enters, so that neither one spike nor many can make
the guard blind; a level that has shifted for good is therefore rejected again and again, and after `max_in_a_row` the
run stops: somebody should look at it. A value of exactly 0 (no response said anything) is accepted and not remembered.

The loop asks `accepts`; `judge` is the rule by itself.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nemo_opd.config import GuardConfig
from nemo_opd.processes import Processes


@dataclass(frozen=True)
class Judged:
    """What the guard said of the last update."""

    reason: str = ""
    """Why it was rejected; nothing where it was accepted."""
    broken: bool = False
    """Was it because a number was not finite?"""


class Guard:
    """The guard of one run.

    Args:
        config: windows and bounds.
        state: where the windows are kept: a part of the run's state, filled in place, plain JSON data.
        processes: who decides together.
    """

    def __init__(self, config: GuardConfig, state: dict[str, Any], processes: Processes) -> None:
        self._config, self._state, self._processes = config, state, processes
        self._least = {"loss": config.least_loss, "gradient norm": config.least_grad_norm}
        self._windows: dict[str, list[float]] = {name: state.setdefault(name, []) for name in self._least}
        self._state.setdefault("in_a_row", 0)
        self.max_in_a_row = config.max_in_a_row
        self.last = Judged()

    def accepts(self, loss: float, grad_norm: float) -> bool:
        """Is the update to be applied? The same answer on every rank. One all-reduce of three numbers."""
        numbers = (loss, grad_norm)
        broken = not all(map(math.isfinite, numbers))
        told = self._processes.largest([float(broken), *(0.0 if broken else number for number in numbers)])
        if not told[0]:
            loss, grad_norm = told[1:]
        self.last = self.judge(loss, grad_norm, broken=bool(told[0]))
        return not self.last.reason

    def judge(self, loss: float, grad_norm: float, broken: bool = False) -> Judged:
        """Take in one update; `broken` where some rank saw a number that was not finite."""
        values = {"loss": loss, "gradient norm": grad_norm}
        broken = broken or not all(map(math.isfinite, values.values()))
        if broken:
            reason = ", ".join(f"the {name} is {value:g}" for name, value in values.items())
        else:
            reason = ", ".join(filter(None, (self._spike(name, value) for name, value in values.items())))
        if reason:
            self._state["in_a_row"] += 1
            return Judged(reason, broken)
        self._state["in_a_row"] = 0
        for name, value in values.items():
            if value:
                self._windows[name].append(value)
                del self._windows[name][: -self._config.window]
        return Judged()

    @property
    def in_a_row(self) -> int:
        """Updates that were rejected since the last accepted one."""
        return int(self._state["in_a_row"])

    @property
    def stop(self) -> str:
        """Why the run is to end; nothing while it may go on."""
        if self.max_in_a_row is None or self.in_a_row < self.max_in_a_row:
            return ""
        return f"guard: {self.in_a_row} updates in a row were rejected, the last because {self.last.reason}"

    def _spike(self, name: str, value: float) -> str:
        window, config = self._windows[name], self._config
        if not config.spikes or len(window) < config.min_history or value <= self._least[name]:
            return ""
        bound = threshold(window, config.sigmas, config.least_spread)
        return f"the {name} {value:.4g} is above {bound:.4g}" if value > bound else ""


def threshold(window: Sequence[float], sigmas: float, least_spread: float) -> float:
    """The largest value that is still usual."""
    mean = statistics.fmean(window)
    return mean + sigmas * max(statistics.pstdev(window, mean), least_spread * abs(mean))
