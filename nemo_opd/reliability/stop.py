"""A run is asked to stop by a signal to one of its processes, by a file in its folder or by the end of its time. It
stops between two steps. What was trained by then is saved; rollouts that are being written and an evaluation are broken
off.

`control/stop` holds the id of the attempt it means (or `any`), so that a run that was started again does not obey a
request made to its predecessor. The decision is taken by all ranks together, at the same point of the same step.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path
from types import FrameType

from nemo_opd.processes import Processes
from nemo_opd.reliability.budget import TimeBudget

log = logging.getLogger(__name__)

ANY_ATTEMPT = "any"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_FILE_CHECK_INTERVAL = 0.5  # seconds: the file may be on a network file system, and rollouts ask for every token


def forget_old_request(run_dir: Path, attempt: str) -> None:
    """Remove a request that lay there before this attempt began; `any` would stop every attempt otherwise.

    One that names this attempt stays: Ctrl-C may come while the processes are still starting.
    """
    if _request(run_dir) != attempt:
        (run_dir / "control" / "stop").unlink(missing_ok=True)


def _request(run_dir: Path) -> str | None:
    try:
        return (run_dir / "control" / "stop").read_text().strip()
    except OSError:
        return None


class StopRequest:
    """Asked between tokens (`requested`) and between steps (`agreed`)."""

    def __init__(
        self, run_dir: Path | None, attempt: str, processes: Processes, budget: TimeBudget | None = None
    ) -> None:
        """`run_dir` None: no file is looked at. `budget` None: there is time enough."""
        self.budget = budget or TimeBudget()
        self._run_dir = run_dir
        self._attempt = attempt
        self._processes = processes
        self._asked = False
        self._next_look = 0.0
        self.reason = ""

    def listen(self) -> StopRequest:
        """Take SIGINT, SIGTERM and SIGUSR1 as requests. A second SIGINT interrupts at once."""
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)
        return self

    def requested(self) -> bool:
        """Has this process been asked? Cheap enough for every token."""
        now = time.monotonic()
        if not self._asked and now >= self._next_look:
            self._next_look = now + _FILE_CHECK_INTERVAL
            self._look()
        return self._asked

    def agreed(self) -> bool:
        """Has any process been asked? The same answer on every rank; collective.

        A request that reaches this rank while it waits for the others counts the next time: they know nothing of it.
        """
        self._next_look = 0.0
        agreed = self._processes.any(self.requested())
        if agreed:
            self._asked = True
            self.reason = self.reason or "another rank was asked to stop"
        return agreed

    def _look(self) -> None:
        if self._run_dir is not None and _request(self._run_dir) in (self._attempt, ANY_ATTEMPT):
            self._asked = True
            self.reason = "control/stop asks for it"
        elif reason := self.budget.used_up():
            self._asked = True
            self.reason = reason

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True
        self.reason = f"signal {signal.Signals(number).name}"
        os.write(2, b"\nstopping, with a checkpoint of what is trained (Ctrl-C again: at once, without one)\n")
