"""What a run was started with, the folders and files that it reads again at every start: models and data.

A checkpoint holds their hashes, so that a run does not go on with another teacher, or over other problems, without
anybody noticing. Contents count, not places: a folder may be moved. Files whose size and time are those that the
checkpoint knows are not read again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nemo_opd.errors import ConfigError
from nemo_opd.processes import Processes

log = logging.getLogger(__name__)

_READERS = 8
"""Files that are hashed at a time: one thread does about 1.5 GB/s."""

Known = Mapping[str, Any]
"""``path``, ``revision`` (of a folder of Hugging Face's cache, else null), ``files`` (name -> size and time of change)
and ``sha256`` over names and contents; plain JSON data."""


def look(path: Path, known: Known | None = None) -> dict[str, Any]:
    """The fingerprint of a file, of the weights in a model folder (its safetensors), or of all files of another one."""
    files = _files(path)
    stats = {name: [file.stat().st_size, file.stat().st_mtime_ns] for name, file in files.items()}
    unchanged = known is not None and known["files"] == stats
    resolved = path.resolve()
    return {
        "path": str(path),
        "revision": resolved.name if resolved.parent.name == "snapshots" else None,
        "files": stats,
        "sha256": known["sha256"] if unchanged and known else _sha256(files),
    }


def same_inputs(
    paths: Mapping[str, Path], known: Mapping[str, Known], accepted: bool, processes: Processes
) -> dict[str, dict[str, Any]]:
    """The fingerprint of each input by its configuration key, to be kept in a checkpoint. Collective.

    Args:
        known: those of the checkpoint that the run goes on from; empty in a new run.
        accepted: another input is said rather than refused.

    Raises:
        ConfigError: an input cannot be read, or is not what it was; alike on every rank.
    """
    found = json.loads(processes.broadcast_text(json.dumps(_look_at_all(paths, known)) if processes.is_first else ""))
    for key, path in paths.items():
        if "error" in found[key]:
            raise ConfigError(key, found[key]["error"], "files that can be read", "check path and permissions")
        if key in known and known[key]["sha256"] != found[key]["sha256"]:
            got = f"{path} with other {'data' if key == 'data.path' else 'weights'} than at the start"
            if not accepted:
                way_out = "restore it, or start a new run folder; run.accept_changes=true goes on all the same"
                raise ConfigError(
                    key, got, f"what the run began with (SHA-256 {known[key]['sha256'][:12]}...)", way_out
                )
            if processes.is_first:
                log.warning("%s: %s; the run goes on, as run.accept_changes says", key, got)
    return found


def _look_at_all(paths: Mapping[str, Path], known: Mapping[str, Known]) -> dict[str, dict[str, Any]]:
    found = {}
    for key, path in paths.items():
        try:
            found[key] = look(path, known.get(key))
        except OSError as error:
            found[key] = {"error": str(error)}
    return found


def _files(path: Path) -> dict[str, Path]:
    """Those that count, by name; a file alone has none, so that it may be renamed."""
    if not path.is_dir():
        return {"": path}
    pattern = "*.safetensors" if (path / "config.json").exists() else "**/*"
    return {str(file.relative_to(path)): file for file in sorted(path.glob(pattern)) if file.is_file()}


def _sha256(files: Mapping[str, Path]) -> str:
    whole = hashlib.sha256()
    with ThreadPoolExecutor(_READERS) as readers:
        for name, digest in zip(files, readers.map(_digest, files.values()), strict=True):
            whole.update(f"{name} {digest}\n".encode())
    return whole.hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
