"""Wall time of the parts of a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext


class Clock:
    """Adds up seconds by section name; what no section claimed is `rest`."""

    def __init__(self, told: Callable[[str], AbstractContextManager[object]] = nullcontext) -> None:
        """`told` is entered with each section's name."""
        self._told = told
        self._start = time.perf_counter()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            with self._told(name):
                yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - begin

    @property
    def total(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self._start

    def seconds(self) -> dict[str, float]:
        """Seconds by section, `rest` and `total` included."""
        total = self.total
        return {**self._seconds, "rest": total - sum(self._seconds.values()), "total": total}
