"""Whether a run goes on, and whether what it goes on from is its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_opd.checkpoint.fingerprint import same_inputs
from nemo_opd.checkpoint.store import CONFIG_FILE, CheckpointStore, read_state
from nemo_opd.config import Config
from nemo_opd.configuration.changes import check_changes
from nemo_opd.processes import Processes


def begun_before(
    config: Config, store: CheckpointStore, processes: Processes
) -> tuple[Path | None, dict[str, dict[str, Any]]]:
    """The checkpoint to go on from, if there is one, and the fingerprints of what the run reads at every start.

    Collective. Raises ConfigError where the checkpoint is another run's.
    """
    newest, known = store.newest(), {}
    if newest:
        state = read_state(newest)
        check_changes(newest / CONFIG_FILE, state.step, config)
        known = state.inputs
    folders: dict[str, str | None] = {"student.model": config.student.model, "data.path": config.data.path}
    for key, teacher in config.every_teacher().items():
        folders |= {f"{key}.model": teacher.model, f"{key}.base_model": teacher.base_model}
    paths = {key: Path(folder) for key, folder in folders.items() if folder is not None}
    return newest, same_inputs(paths, known, config.run.accept_changes, processes)
