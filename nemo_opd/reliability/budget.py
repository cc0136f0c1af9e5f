"""Time that a run may use: it stops by itself early enough to save.

Two ends count, the earlier one: `run.time_limit` after the start, and the end of the SLURM job, which slurm/opd.sh
leaves in the environment. What is kept free before it is measured: the last save, and what a step does after its
rollouts, for it is not broken off in there.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from nemo_opd.reliability.files import private_folder, replace_private

log = logging.getLogger(__name__)

END_VARIABLE = "NEMO_OPD_END_TIME"
"""Environment variable with the time, in seconds since 1970, at which the job is killed."""
GRACE_VARIABLE = "NEMO_OPD_GRACE"
"""Environment variable with the seconds between the job's signal to stop and its end."""

SAFETY = 1.5
"""What was measured may take so much longer the next time."""
ENDING_SECONDS = 5.0
"""Kept free besides, for processes to end."""


class TimeBudget:
    """Example: ``TimeBudget(run_dir, 3600.0)`` is used up when an hour is over, but for the time of a save."""

    def __init__(
        self,
        run_dir: Path | None = None,
        limit: float | None = None,
        environment: Mapping[str, str] = os.environ,
        now: Callable[[], float] = time.time,
    ) -> None:
        """
        Args:
            run_dir: where the time of the last save is remembered; None: nowhere.
            limit: seconds from now on; None: the job's end alone counts.
        """
        self._now = now
        self._file = None if run_dir is None else _save_file(run_dir)
        ends = [] if limit is None else [now() + limit]
        if run_dir is not None and (end := _number(environment.get(END_VARIABLE))):
            ends.append(end)
        self._end = min(ends, default=math.inf)
        self._grace = _number(environment.get(GRACE_VARIABLE)) if run_dir is not None else None
        self._save = (last_save(run_dir) if run_dir is not None else None) or 0.0
        self._rest = 0.0

    @property
    def reserve(self) -> float:
        """Seconds that are kept free before the end."""
        return SAFETY * (self._save + self._rest) + ENDING_SECONDS

    def used_up(self) -> str:
        """The reason to stop now; empty while there is time."""
        left = self._end - self._now()
        if left > self.reserve:
            return ""
        return f"time limit: {max(left, 0):.0f} s are left, {self.reserve:.0f} s are kept for a save"

    def warn(self) -> None:
        """Say so where the last save took longer than the job is given after its signal to stop."""
        if self._grace is not None and self._save > self._grace:
            log.warning(
                "the last save took %.0f s, but the job has %.0f s between its signal to stop and its end: give it "
                "more (grace in slurm/env.sh), or the checkpoint of a preempted run may be lost",
                self._save,
                self._grace,
            )

    def saved(self, seconds: float, keep: bool) -> None:
        """A save took so long; `keep` it for the next attempt, which one process does."""
        self._save = seconds
        if keep and self._file is not None:
            private_folder(self._file.parent)
            replace_private(self._file, json.dumps({"seconds": round(seconds, 3)}) + "\n")

    def stepped(self, seconds: float) -> None:
        """A step took so long after its rollouts were there."""
        self._rest = seconds


def last_save(run_dir: Path) -> float | None:
    """Seconds that the last save of an earlier attempt took."""
    try:
        return float(json.loads(_save_file(run_dir).read_text())["seconds"])
    except (OSError, ValueError, TypeError, KeyError):  # the first attempt, or a damaged file
        return None


def _save_file(run_dir: Path) -> Path:
    return run_dir / "control" / "last-save.json"


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None
