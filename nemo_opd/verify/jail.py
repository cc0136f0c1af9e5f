"""The process jail, from outside: start jails, hand them jobs, end them.

A jail is a Python of its own in a new session, which isolates itself (`nemo_opd.verify.jail_inside`) before it is
told what to run. Tests and program sit in one each (`nemo_opd.verify.jail_roles`); see `nemo_opd.verify.code` for
what that protects from and what not.
"""

from __future__ import annotations

import contextlib
import functools
import hmac
import json
import logging
import math
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_opd.verify.base import GraderUnavailableError, GradingTimeoutError

_LOG = logging.getLogger(__name__)

WALL_SECONDS_PER_CPU_SECOND = 4
"""How much slower than alone on its core a program may run, or how long it may sleep."""
_START_SECONDS = 60.0
"""Until a jail is closed; some hundredths of a second on an idle machine."""
_END_SECONDS = 5.0
_MAX_LINE = 65_536
_SCRIPT = Path(__file__).with_name("jail_inside.py")
_PYTHON = (sys.executable, "-P", "-S", "-s", "-B", "-X", "utf8", str(_SCRIPT))
"""Without site-packages, and without this folder on the path."""


@dataclass(frozen=True)
class Limits:
    """What each of the two processes may use."""

    seconds: float = 1.0
    """CPU time, rounded up to whole seconds; the limit of wall time is WALL_SECONDS_PER_CPU_SECOND times it."""
    memory_bytes: int = 512 * 2**20
    """Address space. There is one process, so this is all of its memory but the scratch folder's."""
    scratch_bytes: int = 16 * 2**20
    """Files in its working folder, which lies in memory."""
    threads: int = 16
    open_files: int = 64


def run_tests(program: str, tests: str, limits: Limits, namespaces: bool) -> tuple[bool, int]:
    """Run tests on a program.

    Args:
        tests: Python text; names that it does not define are functions of the program.
        namespaces: whether jails get namespaces of their own (`namespaces_permitted`).

    Returns:
        Whether the tests passed, and how many calls of the program they made.

    Raises:
        GradingTimeoutError: out of time.
        GraderUnavailableError: a jail could not be closed.
    """
    requests_out, requests_in = os.pipe()
    answers_out, answers_in = os.pipe()
    nonce = secrets.token_hex(16)
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(_open(requests_out, requests_in, answers_out, answers_in))
        # One after the other: nothing strange runs before the process that decides is closed to others' eyes.
        judge = stack.enter_context(_jail("tests", limits, namespaces, answers_out, requests_in))
        defendant = stack.enter_context(_jail("program", limits, namespaces, requests_out, answers_in))
        ours.close()  # or neither would see the other's end
        defendant.send({"program": program})
        judge.send({"tests": tests, "nonce": nonce})
        verdict = judge.receive(limits.seconds * WALL_SECONDS_PER_CPU_SECOND)
        if verdict is None or (verdict.get("ended") and defendant.was_killed()):
            raise GradingTimeoutError
    is_genuine = hmac.compare_digest(str(verdict.get("nonce")).encode(), nonce.encode())
    return is_genuine and verdict.get("right") is True, int(verdict.get("calls", 0))


@functools.cache
def namespaces_permitted() -> bool:
    """Does this machine give a jail its own namespaces? Tried once.

    Raises:
        GraderUnavailableError: not even a jail without them can be closed here.
    """
    try:
        with _jail("probe", Limits(), True):
            return True
    except GraderUnavailableError as refusal:
        with _jail("probe", Limits(), False):
            _LOG.warning("jails without namespaces: programs can read files that others may read (%s)", refusal)
            return False


class _Jail:
    """A jailed process that has said that it is closed."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._buffer = b""
        first = self.receive(_START_SECONDS)
        if first is None or "ready" not in first:
            raise GraderUnavailableError(f"a jail could not be closed: {(first or {}).get('failed', 'no answer')}")

    def send(self, job: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its end shows in what it does not answer
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()

    def receive(self, seconds: float) -> dict[str, Any] | None:
        """One line; None where it ended, wrote too much or nothing in time."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + seconds
        while b"\n" not in self._buffer and len(self._buffer) < _MAX_LINE:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            chunk = os.read(self._process.stdout.fileno(), _MAX_LINE) if ready else b""
            if not chunk:
                return None
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            return None
        return value if isinstance(value, dict) else None

    def was_killed(self) -> bool:
        """Did the kernel end it, which is how it enforces the limit of CPU time?"""
        try:
            return self._process.wait(_END_SECONDS) in (-signal.SIGKILL, 128 + signal.SIGKILL)
        except subprocess.TimeoutExpired:
            return False


@contextlib.contextmanager
def _jail(role: str, limits: Limits, namespaces: bool, read: int = -1, write: int = -1) -> Iterator[_Jail]:
    """A closed jail, ended with all its threads and its folder when the block is left."""
    settings = {
        "cpu_seconds": math.ceil(limits.seconds),
        "memory_bytes": limits.memory_bytes,
        "scratch_bytes": limits.scratch_bytes,
        "threads": limits.threads,
        "open_files": limits.open_files,
        "namespaces": namespaces,
        "read": read,
        "write": write,
    }
    with tempfile.TemporaryDirectory(prefix="jail-", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [*_PYTHON, role, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PYTHONHASHSEED": "0"},  # so that the same program earns the same reward
            pass_fds=[descriptor for descriptor in (read, write) if descriptor >= 0],
            start_new_session=True,
        )
        try:
            yield _Jail(process)
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:  # else its number may be another's by now
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout):
        assert stream is not None
        with contextlib.suppress(OSError):  # unsent bytes of a job to a dead process
            stream.close()


@contextlib.contextmanager
def _open(*descriptors: int) -> Iterator[contextlib.ExitStack]:
    """Descriptors that are closed when the block is left, or before."""
    with contextlib.ExitStack() as stack:
        for descriptor in descriptors:
            stack.callback(os.close, descriptor)
        yield stack
