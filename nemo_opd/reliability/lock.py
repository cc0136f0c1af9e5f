"""One run folder, one run: an advisory lock that the kernel gives back when its process ends, however it ends.

Two locks lie in a run folder. `run` is held by rank 0 while it trains. `start` is held by the process that a user
started, from before its children exist until they are gone, so that a second start is refused before it loads anything.
On a network file system the lock is as good as the file system's own (NFS and Lustre mounted with `flock` are fine).
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import IO

from nemo_opd.errors import ConfigError

_NAMES = {"run": ".lock", "start": ".lock-start"}
_TRIES = 5
_PAUSE = 0.1  # seconds between tries: somebody may only be probing


class RunLocked(ConfigError):
    """Another process uses the run folder. Whoever gets this must not write into the folder."""


class RunLock:
    """``with RunLock(run_dir): ...``; raises RunLocked within a second when another process holds it.

    The file is never deleted: a process that had opened a deleted one would hold a lock that nobody else can see.
    """

    def __init__(self, run_dir: Path, name: str = "run") -> None:
        self._run_dir = run_dir
        self._path = run_dir / _NAMES[name]
        self._file: IO[str] | None = None

    def __enter__(self) -> RunLock:
        self._run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        self._file = os.fdopen(descriptor, "r+")
        for remaining in reversed(range(_TRIES)):
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not remaining:
                    holder = self._file.read()
                    self._file.close()
                    raise _refusal(self._run_dir, holder) from None
                time.sleep(_PAUSE)
        self._file.truncate(0)
        json.dump({"pid": os.getpid(), "host": socket.gethostname()}, self._file)
        self._file.flush()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        self._file.close()


def probe(run_dir: Path, name: str = "run") -> None:
    """Raise RunLocked when another process holds the lock; take nothing, create nothing."""
    path = run_dir / _NAMES[name]
    try:
        file = path.open()
    except FileNotFoundError:
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _refusal(run_dir, file.read()) from None


def _refusal(run_dir: Path, holder: str) -> RunLocked:
    try:
        fields = json.loads(holder)
        who = f"process {fields['pid']} on {fields['host']}"
    except (ValueError, TypeError, KeyError):
        who = "another process"
    return RunLocked(
        "run.dir",
        f"{run_dir}, in use by {who}",
        "a run folder that no other process uses",
        "wait for that run, stop it (Ctrl-C, or kill -TERM), or choose another run.dir",
    )
