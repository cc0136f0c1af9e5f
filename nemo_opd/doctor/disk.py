"""Can the run folder be written, is there room for its checkpoints, and does fsync come back?"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
import time
from math import prod
from pathlib import Path

from nemo_opd.config import Config
from nemo_opd.doctor.finding import Finding, Verdict, at_least, at_most

FSYNC_SECONDS = 0.5
"""A checkpoint syncs every file that it writes, and the metrics their line."""
_TRIES, _BLOCK = 5, 1 << 20
_GIB = float(1 << 30)
_STATE_BYTES = 12
"""Of a parameter in a checkpoint, besides the weight itself: float32 master weight and Adam's two moments."""
_BYTES = {"bfloat16": 2, "float32": 4, "float64": 8}
SHARED_MEMORY = Path("/dev/shm")


def disk_findings(config: Config) -> list[Finding]:
    """Of the folder that the run folder is made in, and of shared memory where weights go through it."""
    parent = existing(Path(config.run.dir).absolute())
    found = [written(parent)]
    if found[0].verdict is Verdict.OK:
        found += [synced(parent), room(config, shutil.disk_usage(parent).free)]
    servers = config.rollout.servers
    through_files = config.rollout.engine == "vllm" and servers.transport == "disk"
    if through_files and servers.urls is None and servers.weights_dir is None and SHARED_MEMORY.is_dir():
        found.append(shared_room(config, shutil.disk_usage(SHARED_MEMORY).free))
    return found


def existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def written(folder: Path) -> Finding:
    """Make, sync, rename and remove a file, as a checkpoint does."""
    name = "disk: writing"
    try:
        with tempfile.TemporaryDirectory(prefix=".nemo-opd-doctor-", dir=folder) as scratch:
            file = Path(scratch) / "a"
            _write(file, b"x")
            file.replace(Path(scratch) / "b")
    except OSError as error:
        way_out = "choose another run.dir, or make this one writable"
        return Finding(name, Verdict.FAIL, f"{error.strerror} in {folder}", "a file", way_out)
    return Finding(name, Verdict.OK, str(folder), "a file")


def synced(folder: Path) -> Finding:
    """Median seconds of writing 1 MiB and syncing it."""
    seconds = []
    with tempfile.TemporaryDirectory(prefix=".nemo-opd-doctor-", dir=folder) as scratch:
        for number in range(_TRIES):
            begin = time.perf_counter()
            _write(Path(scratch) / str(number), bytes(_BLOCK))
            seconds.append(time.perf_counter() - begin)
    way_out = "every step waits for it: put run.dir on a faster file system"
    return at_most("disk: fsync of 1 MiB, s", statistics.median(seconds), FSYNC_SECONDS, way_out, above=Verdict.WARN)


def room(config: Config, free: int) -> Finding:
    """Checkpoints that are kept, one that is being written, and the exported model."""
    weights, parameters = model_bytes(Path(config.student.model)), parameter_count(Path(config.student.model))
    copies = 2 if any(teacher.source == "ema" for teacher in config.every_teacher().values()) else 1
    checkpoint = parameters * (_BYTES[config.student.dtype] * copies + _STATE_BYTES)
    needed = checkpoint * (config.checkpoint.keep + 1) + (weights if config.checkpoint.export_at_end else 0)
    way_out = (
        f"free some ({config.checkpoint.keep} + 1 checkpoints are written): lower checkpoint.keep, or move run.dir"
    )
    return at_least("disk: free, GiB", free / _GIB, needed / _GIB, way_out)


def shared_room(config: Config, free: int) -> Finding:
    """Two sets of weights: the one that servers hold, and the one that they are given."""
    needed = 2 * parameter_count(Path(config.student.model)) * _BYTES[config.student.dtype]
    way_out = "give the container more (--shm-size), or set rollout.servers.weights_dir"
    return at_least("disk: free shared memory, GiB", free / _GIB, needed / _GIB, way_out)


def model_bytes(folder: Path) -> int:
    """Size of a model's safetensors."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def parameter_count(folder: Path) -> int:
    """From the headers of a model's safetensors: 8 bytes of length, then JSON."""
    count = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as content:
            header = json.loads(content.read(int.from_bytes(content.read(8), "little")))
        count += sum(prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    return count


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
