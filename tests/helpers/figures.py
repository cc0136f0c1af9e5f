"""Figures of the promises (docs/recovery.md): a test says what it counted, and `make chaos` makes a table of it.

NEMO_OPD_FIGURES=FILE    one line of JSON for each figure is appended there; without it they are checked only
NEMO_OPD_CHAOS=full      as often as the promise says; without it a few times, which is what `make test` does
"""

from __future__ import annotations

import json
import os
from pathlib import Path


def record(promise: str, what: str, value: str) -> None:
    """Remember a figure: ``record("R1", "unloadable after kill -9 while saving", "0 / 200")``."""
    if path := os.environ.get("NEMO_OPD_FIGURES"):
        with Path(path).open("a") as file:
            file.write(json.dumps({"promise": promise, "what": what, "value": value}) + "\n")


def trials(full: int, short: int) -> int:
    """How often to try."""
    return full if os.environ.get("NEMO_OPD_CHAOS") == "full" else short
