"""Checkpoints of a run: written aside, then renamed, so that a folder named `step-*` is always a whole one.

    run/checkpoints/tmp-00000100-1f3a/   being written
    run/checkpoints/step-00000100/       state.json, config.yaml, model/ (Megatron's distributed checkpoint)

There is no "latest" file: the newest checkpoint is the `step-*` folder with the greatest step whose state parses.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from nemo_opd.engines.protocols import Trainer
from nemo_opd.errors import ConfigError
from nemo_opd.processes import Processes

log = logging.getLogger(__name__)

STATE_FILE = "state.json"
MODEL_FOLDER = "model"
CONFIG_FILE = "config.yaml"
_UNREADABLE = "?"


@dataclass
class RunState:
    """All that decides how a run goes on, besides model, optimizer and schedule.

    Random numbers are derived from (seed, epoch, prompt, sample), so no generator state is kept.
    """

    step: int = 0
    """Optimizer steps done; also the version of the policy."""
    prompts: dict[str, Any] = field(default_factory=dict)
    """Position of the prompt stream."""
    counters: dict[str, float] = field(default_factory=dict)
    """Totals since the start of the run (tokens generated, tokens trained, scores dropped, ...)."""
    algorithm: dict[str, Any] = field(default_factory=dict)
    """By name, what the parts of the algorithm remember (`Stateful`): plain JSON data, the same on every rank."""
    diagnosis: dict[str, Any] = field(default_factory=dict)
    """Windows and counts of `nemo_opd.diagnosis`."""


class Stateful(Protocol):
    """A part of the algorithm that remembers something from step to step."""

    def state(self) -> dict[str, Any]:
        """All that decides how it goes on, as plain JSON data (finite numbers: they survive JSON bit for bit)."""

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""


def restore(parts: Mapping[str, Stateful], state: RunState) -> None:
    """Give each part what it remembered; one that the checkpoint does not know starts afresh, and says so."""
    for name, part in parts.items():
        if name in state.algorithm:
            part.load_state(state.algorithm[name])
        elif state.step:
            log.warning("%s was not part of the run until step %d: it begins without a history", name, state.step)


class CheckpointStore:
    """The checkpoints below one run folder."""

    def __init__(self, run_dir: Path, processes: Processes, keep: int) -> None:
        self.folder = run_dir / "checkpoints"
        self._processes = processes
        self._keep = keep
        if processes.is_first:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in [*self.folder.glob("tmp-*"), *self.folder.glob("trash-*")]:
                log.warning("removing %s, left by an interrupted save", leftover.name)
                shutil.rmtree(leftover)
        processes.barrier()

    def newest(self) -> Path | None:
        """The newest whole checkpoint, the same on every rank; None in a new run.

        Raises:
            ConfigError: there are checkpoints, and none can be read: a run is never started anew over them.
        """
        name = ""
        if self._processes.is_first:
            path = newest_checkpoint(self.folder)
            name = path.name if path else ""
            if path is None and any(self.folder.glob("step-*")):
                name = _UNREADABLE
        name = self._processes.broadcast_text(name)
        if name == _UNREADABLE:
            raise ConfigError(
                str(self.folder),
                "checkpoints, none of which can be read",
                "one whole step-* folder, or none",
                "put one back, or choose another run.dir to start anew",
            )
        return self.folder / name if name else None

    def save(
        self, trainer: Trainer, state: RunState, config_text: str, files: Mapping[str, bytes] = MappingProxyType({})
    ) -> Path:
        """Write a checkpoint of `state.step` and drop the oldest beyond `keep`. Collective.

        `files` are of the run's own, by name; those of rank 0 are written.
        """
        final = self.folder / f"step-{state.step:08d}"
        name = self._processes.broadcast_text(f"tmp-{state.step:08d}-{secrets.token_hex(4)}")
        temporary = self.folder / name
        if self._processes.is_first:
            (temporary / MODEL_FOLDER).mkdir(parents=True)
        self._processes.barrier()
        trainer.save(temporary / MODEL_FOLDER)
        self._processes.barrier()
        if self._processes.is_first:
            for name, content in files.items():
                _write_synced(temporary / name, content)
            _write_synced(temporary / CONFIG_FILE, config_text)
            _write_synced(temporary / STATE_FILE, json.dumps(asdict(state), indent=1))
            if final.exists():  # the same step again, after a resume that went back to an older checkpoint
                _remove(final)
            temporary.rename(final)
            _sync_folder(self.folder)
            self._retain()
        self._processes.barrier()
        return final

    def load(self, path: Path, trainer: Trainer) -> RunState:
        """Bring the trainer to the checkpoint's state and return the rest of it. Collective."""
        trainer.load(path / MODEL_FOLDER)
        return read_state(path)

    def _retain(self) -> None:
        for old in checkpoints(self.folder)[: -self._keep]:
            _remove(old)


def checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints below `folder` whose state parses, oldest first."""
    return [path for path in sorted(folder.glob("step-*")) if _parses(path)]


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest committed checkpoint below `folder`, or None."""
    found = checkpoints(folder)
    return found[-1] if found else None


def read_state(path: Path) -> RunState:
    """The run state stored in a checkpoint."""
    return RunState(**json.loads((path / STATE_FILE).read_text()))


def _parses(path: Path) -> bool:
    try:
        read_state(path)
    except (OSError, ValueError, TypeError) as error:
        log.warning("passing over checkpoint %s: %s", path.name, error)
        return False
    return True


def _remove(path: Path) -> None:
    """Rename first, so that a half-deleted checkpoint never looks like a whole one."""
    trash = path.with_name(f"trash-{path.name}-{secrets.token_hex(4)}")
    path.rename(trash)
    shutil.rmtree(trash)


def _write_synced(path: Path, content: str | bytes) -> None:
    with path.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
