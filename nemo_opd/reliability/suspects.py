"""Which rank a run hangs at, from what all of them last said: a pure rule.

When one rank hangs, the others wait for it, in the same section or the next one, and their time runs out as well. So
time alone says nothing. Suspects are, of those that are there,

1. the ranks whose beat stands still (stopped, or a call holds the interpreter's lock);
2. if none: the ranks that are not waiting for others;
3. if none, all of them wait: those that entered the fewest sections (a collective that not all of them entered).

The run hangs when a suspect has been in its section for longer than that section's limit, and only then: a rank that
waits for a slow one is as slow as that one is allowed to be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nemo_opd.reliability.heartbeat import Beat


@dataclass(frozen=True)
class Watched:
    """A rank, and how long the watcher has seen no change."""

    beat: Beat
    age: float
    """Seconds in its section."""
    silence: float
    """Seconds since its last beat."""
    stopped: bool = False
    """Is it known that a signal keeps it from running?"""


@dataclass(frozen=True)
class Hang:
    """The rank that the others wait for."""

    rank: int
    host: str
    section: str
    age: float
    limit: float
    how: str

    def __str__(self) -> str:
        return (
            f"rank {self.rank} on {self.host} hangs: {self.age:.1f} s in section {self.section}, "
            f"limits.{self.section} is {self.limit:g} s; {self.how}"
        )


def find_hang(ranks: Sequence[Watched], limits: Mapping[str, float | None], silent_after: float) -> Hang | None:
    """The first suspect beyond its limit; None while there is none.

    Args:
        limits: seconds by section; a section without one is not watched.
        silent_after: seconds without a beat from which a rank cannot be running.
    """
    silent = [rank for rank in ranks if rank.silence >= silent_after]
    busy = [rank for rank in ranks if not rank.beat.waits]
    fewest = min((rank.beat.entry for rank in ranks), default=0)
    suspects = silent or busy or [rank for rank in ranks if rank.beat.entry == fewest]
    patience = 0.0 if silent or busy else silent_after  # that all wait may be the last thing that a stopped one said
    for rank in sorted(suspects, key=lambda rank: (rank.beat.entry, -rank.silence, rank.beat.rank)):
        limit = limits.get(rank.beat.section)
        if limit is not None and rank.age > limit + patience:
            how = _how(rank, bool(silent), bool(busy))
            return Hang(rank.beat.rank, rank.beat.host, rank.beat.section, rank.age, limit, how)
    return None


def _how(rank: Watched, silent: bool, busy: bool) -> str:
    place = f", last seen in {rank.beat.where}" if rank.beat.where else ""
    if silent:
        why = "it is stopped by a signal" if rank.stopped else "a call holds the interpreter's lock, or it is stopped"
        return f"it has not run for {rank.silence:.0f} s: {why}{place}"
    if busy:
        return f"it runs, and waits for no other rank{place}"
    return f"all ranks wait for each other, this one the furthest behind{place}"
