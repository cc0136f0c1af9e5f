"""What the weights in a folder are, in 64 letters."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_opd.errors import ConfigError
from nemo_opd.processes import Processes


def fingerprint(folder: Path) -> str:
    """SHA-256 over names and contents of a folder's safetensors files. About a second for 1.5 GB."""
    whole = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            whole.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()


class StartWeights:
    """The weights that a run started from and that it reads again at every start, for its frozen teacher.

    `nemo_opd.checkpoint.store.Stateful`. Collective: one broadcast.
    """

    def __init__(self, folder: Path, processes: Processes) -> None:
        self._folder = folder
        self._found = processes.broadcast_text(fingerprint(folder) if processes.is_first else "")

    def state(self) -> dict[str, Any]:
        """See `Stateful.state`."""
        return {"sha256": self._found}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Raises ConfigError when the folder holds other weights by now."""
        if state["sha256"] != self._found:
            got = f"{self._folder} with other weights than at the start"
            expected = "the weights that the run started from, of which its frozen teacher is made"
            raise ConfigError("student.model", got, expected, "restore the folder, or start a new run folder")
