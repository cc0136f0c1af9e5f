"""What each rank is at, as a small file that others can read while the rank itself cannot speak.

    <run>/heartbeat/rank-00003      one line of JSON, rewritten in place

Two threads write it. The main one says which section it enters; a second one beats a few times per second, so that a
process that is stopped, or a call that holds the interpreter's lock, shows as a beat that stands still. The beat also
looks where the main thread is: one that waits for other ranks inside a collective is not what they all wait for.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Protocol

from nemo_opd.reliability.files import private_descriptor, private_folder

log = logging.getLogger(__name__)

FOLDER = "heartbeat"
BETWEEN = "between"
"""Where no section was entered: decisions of all ranks, metrics."""
ENDED = ""
"""The section of a rank that needs no watching any more."""
BEAT_SECONDS = 0.25
_BYTES = 1024
_WAITS = (
    f"{os.sep}torch{os.sep}distributed{os.sep}",
    f"{os.sep}pipeline_parallel{os.sep}p2p_communication.py",
    f"{os.sep}core{os.sep}distributed{os.sep}param_and_grad_buffer.py",
    f"{os.sep}engines{os.sep}exchange.py",
    f"{os.sep}vocab{os.sep}collectives.py",
)
"""Parts of the names of files whose functions wait for other ranks: PyTorch's own, and where a request that it gave is
waited for (that call has no frame of its own)."""
_OURS = f"{os.sep}nemo_opd{os.sep}"
_DEPTH = 60


@dataclass(frozen=True)
class Beat:
    """What one rank last said."""

    rank: int
    host: str
    pid: int
    born: int
    """When the process began, in clock ticks since its machine did: with the pid, its name."""
    start: str
    """Which start of the run it belongs to."""
    section: str = BETWEEN
    entry: int = 0
    """Sections that it has entered; ranks go through the same ones."""
    since: float = 0.0
    """When it entered this one, seconds since the epoch, for people."""
    count: int = 0
    """Beats so far: one that stands still is a process that cannot run."""
    waits: bool = False
    """Was it waiting for other ranks at the last beat?"""
    where: str = ""
    """Where in our own code the last beat found it: ``scorer.py:81 score``."""


class Sections(Protocol):
    """Who is told where this rank is."""

    def section(self, name: str) -> AbstractContextManager[None]:
        """While the block runs this rank is in it."""


class Silent:
    """For runs that nobody watches."""

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        yield


class Heartbeat:
    """The heartbeat of this rank, from `begin` to `end`.

    Args:
        run_dir: its folder is made here, for this user alone.
        rank: of this process.
        start: which start of the run this is.
        synced: write to the disk every time, for readers on other nodes.
    """

    def __init__(self, run_dir: Path, rank: int, start: str, synced: bool = False) -> None:
        self._path, self._synced = beat_file(run_dir, rank), synced
        self._lock, self._done = threading.Lock(), threading.Event()
        pid = os.getpid()
        self._beat = Beat(rank, socket.gethostname(), pid, born(pid) or 0, start, since=time.time())
        self._main = threading.main_thread().ident
        self._thread = threading.Thread(target=self._tick, daemon=True, name="heartbeat")

    def begin(self) -> Heartbeat:
        """Raises ConfigError for a link in the place of the file or its folder."""
        private_folder(self._path.parent)
        self._file = private_descriptor(self._path, os.O_RDWR)
        self._say()
        self._thread.start()
        return self

    def end(self) -> None:
        """Say that there is nothing left to watch."""
        self._done.set()
        self._thread.join()
        self._say(section=ENDED)
        os.close(self._file)

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Say that this rank is in the section, and afterwards that it is back in the one around it."""
        around = self._beat.section
        self._enter(name)
        try:
            yield
        finally:
            self._enter(around)

    def _enter(self, name: str) -> None:
        self._say(section=name, entry=self._beat.entry + 1, since=time.time(), waits=False, where="")

    def _tick(self) -> None:
        while not self._done.wait(BEAT_SECONDS):
            frame = sys._current_frames().get(self._main or 0)
            self._say(count=self._beat.count + 1, waits=waits(frame), where=where(frame))

    def _say(self, **changed: object) -> None:
        with self._lock:
            self._beat = replace(self._beat, **changed)  # type: ignore[arg-type]
            line = json.dumps(vars(self._beat)).encode()[: _BYTES - 1].ljust(_BYTES - 1) + b"\n"
            try:
                os.pwrite(self._file, line, 0)
                if self._synced:
                    os.fdatasync(self._file)
            except OSError as error:  # a full disk must not end a run that only wanted to be watched
                log.debug("heartbeat: %s", error)


def beat_file(run_dir: Path, rank: int) -> Path:
    return run_dir / FOLDER / f"rank-{rank:05d}"


def forget_beats(run_dir: Path) -> None:
    """Remove what ranks of earlier starts said."""
    for path in (run_dir / FOLDER).glob("*"):
        path.unlink(missing_ok=True)


def read_beat(path: Path) -> Beat | None:
    """None where there is none, or one that is just being written."""
    with suppress(OSError, ValueError, TypeError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            return Beat(**json.loads(os.pread(descriptor, _BYTES, 0)))
        finally:
            os.close(descriptor)
    return None


def waits(frame: FrameType | None) -> bool:
    """Is the thread inside of a call that returns when other ranks have come to it?"""
    for _ in range(_DEPTH):
        if frame is None:
            return False
        if any(part in frame.f_code.co_filename for part in _WAITS):
            return True
        frame = frame.f_back
    return False


def where(frame: FrameType | None) -> str:
    """The innermost line of our own code."""
    while frame is not None:
        if _OURS in frame.f_code.co_filename:
            return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return ""


def born(pid: int) -> int | None:
    """When the process began, in clock ticks since the machine did; None when it is no more (or a zombie)."""
    fields = _stat(pid)
    return None if fields is None or fields[0] == "Z" else int(fields[19])


def stopped(pid: int) -> bool:
    """Does a signal keep the process from running?"""
    fields = _stat(pid)
    return fields is not None and fields[0] in "Tt"


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the state on."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
