"""What a server is started with: a JSON file, so that nothing of it stands on a command line."""

from __future__ import annotations

import json
import os
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from nemo_opd.reliability.redact import remember

LOOPBACK = ("127.0.0.1", "::1", "localhost")

WRITER = "writer"
TEACHER = "teacher"
ROLES = (WRITER, TEACHER)
"""A writer draws tokens and takes new weights; a teacher scores."""

DISK = "disk"
TRANSPORTS = (DISK, "nccl", "ipc", "gloo")
"""How a writer takes weights: from a folder, or by a weight-transfer engine of vLLM's kind. nccl and ipc are vLLM's own
and need GPUs (ipc: the trainer's); gloo is ours, for CPUs."""


@dataclass(frozen=True)
class ServerSettings:
    """One server. Sizes are counts, memory is in GiB."""

    model: str
    """Folder in Hugging Face format."""
    role: str
    ready_file: str
    """Written once the server listens: a JSON object with its `url`."""
    weights_dir: str
    """Sets of weights are read from folders below this one, and from nowhere else."""
    dtype: str = "bfloat16"
    host: str = "127.0.0.1"
    port: int = 0
    """0: any free one"""
    key_file: str | None = None
    """Holds the key that every request must carry. Needed where `host` is not the loopback address."""
    max_running: int = 64
    """Sequences that are written at the same time."""
    max_positions: int | None = None
    """Longest sequence; None: the model's, of a teacher as much of it as memory holds."""
    batch_tokens: int | None = None
    """Positions that a teacher computes at a time; None: vLLM's choice."""
    scored_ids: int | None = None
    """A teacher's probabilities are about the ids below this, the student's; None: all that the model knows."""
    transport: str = DISK
    """How a writer takes weights: one of `TRANSPORTS`."""
    sleeps: bool = False
    """The writer can give a GPU's memory up between two calls (vLLM's sleep mode)."""
    tensor_parallel_size: int = 1
    memory_share: float = 0.9
    """Of a GPU's memory."""
    quantization: str = "none"
    """none, or fp8: weights are scaled to FP8 as they are loaded (needs a GPU)."""
    cpu_cache_gib: int = 1
    """Keys and values, where there is no GPU."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> ServerSettings:
        """Fields with a default may be left out. Raises ValueError for unknown ones, for values of other types, for a
        role that does not exist, and for a host that others can reach without a key."""
        values: Any = json.loads(text)
        hints = get_type_hints(cls)
        known = {field.name for field in fields(cls)}
        needed = {field.name for field in fields(cls) if field.default is MISSING}
        if not isinstance(values, dict) or not needed <= set(values) <= known:
            raise ValueError(f"server settings: got {sorted(values)}; expected {sorted(known)}")
        for name, value in values.items():
            if not isinstance(value, hints[name]):
                raise ValueError(f"server settings: got {value!r} for {name}; expected {hints[name]}")
        settings = cls(**values)
        if settings.role not in ROLES:
            raise ValueError(f"server settings: got the role {settings.role}; expected one of {', '.join(ROLES)}")
        if settings.transport not in TRANSPORTS:
            raise ValueError(f"server settings: got transport {settings.transport}; expected {', '.join(TRANSPORTS)}")
        if settings.host not in LOOPBACK and settings.key_file is None:
            raise ValueError(
                f"server settings: got host {settings.host} without a key; expected the loopback address, or a key_file"
            )
        return settings


def read_key(path: str | Path | None) -> str | None:
    """The key in a file, without white space around it; None where there is no file to read.

    Raises ValueError for an empty file, or one that others than its owner may read.
    """
    if path is None:
        return None
    file = Path(path)
    with file.open(encoding="utf-8") as opened:  # looked at when it is open: it may be replaced in between
        if os.fstat(opened.fileno()).st_mode & 0o077:
            raise ValueError(f"key file {file}: others than its owner may read it; chmod 600 it")
        key = opened.read().strip()
    if not key:
        raise ValueError(f"key file {file}: it is empty; write a key into it (openssl rand -hex 32)")
    remember(key)
    return key
