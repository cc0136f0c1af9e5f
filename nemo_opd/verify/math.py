"""The verifier for mathematics: `math-verify` in a process of its own (see `nemo_opd.verify.math_worker`)."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
from typing import Any

from nemo_opd.config import VerifyConfig
from nemo_opd.verify.base import GraderUnavailableError, GradingTimeoutError, UnreadableReferenceError, Verifier
from nemo_opd.verify.math_worker import WALL_SECONDS_PER_CPU_SECOND

SEARCHED_CHARACTERS = 4_000
"""The end of a response in which math-verify looks for the answer when no `verify.answer_pattern` marks it."""
_START_SECONDS = 120.0
"""Until the grading process has imported sympy; seconds on an idle machine."""
_GRACE_SECONDS = 10.0
"""Beyond the wall time that the grading process allows its child, until that process itself is taken to hang."""
_KEPT_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "TMPDIR")
"""Variables that the grading process sees; the others may hold secrets and are none of its business."""


class MathVerifier(Verifier):
    """1 when `math-verify` finds the answer equal to the reference: as numbers, expressions, sets, matrices, intervals.

    The reference may be plain (``1/2``) or LaTeX (``\\frac{1}{2}``). With `verify.answer_pattern`, what follows it is
    the answer; without it math-verify looks through the end of the response (boxed, "final answer is", last formula
    or number). `verify.time_limit` is CPU time for one answer. Thread-safe: answers are graded one at a time.
    """

    def __init__(self, config: VerifyConfig) -> None:
        super().__init__(config)
        self._lock = threading.Lock()
        self._worker: _Worker | None = None

    def grade(self, answer: str, reference: str) -> float:
        search = self._marker is None
        request = {
            "gold": reference.strip(),
            "answer": answer[-SEARCHED_CHARACTERS:] if search else answer.strip(),
            "search": search,
            "seconds": self._time_limit,
        }
        with self._lock:
            verdict = self._ask(request)
        if verdict == "timeout":
            raise GradingTimeoutError
        if verdict == "no_reference":
            raise UnreadableReferenceError(f"{reference[:80]!r} is not read as mathematics")
        if verdict == "error":
            raise ValueError(f"math-verify failed on {answer[:80]!r}")
        return float(verdict == "right")

    def close(self) -> None:
        with self._lock:
            if self._worker is not None:
                self._worker.close()
                self._worker = None

    def _ask(self, request: dict[str, Any]) -> str:
        """The verdict; from a fresh process when the one at hand has died, but only once."""
        for last in (False, True):
            if self._worker is None:
                self._worker = _Worker()
            try:
                return self._worker.ask(request, self._time_limit * WALL_SECONDS_PER_CPU_SECOND + _GRACE_SECONDS)
            except GraderUnavailableError:
                self._worker.close()
                self._worker = None
                if last:
                    raise
        raise AssertionError("unreachable")


class _Worker:
    """A running grading process."""

    def __init__(self) -> None:
        # A session of its own, so that Ctrl-C reaches the run alone, which then ends the process by closing its input.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "nemo_opd.verify.math_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={k: os.environ[k] for k in _KEPT_ENVIRONMENT if k in os.environ} | {"PYTHONHASHSEED": "0"},
            start_new_session=True,
        )
        self._buffer = b""
        try:
            self._reply(time.monotonic() + _START_SECONDS)
        except GraderUnavailableError:
            self.close()
            raise

    def ask(self, request: dict[str, Any], seconds: float) -> str:
        """The verdict on one request. Raises GraderUnavailableError after `seconds`, or when the process has died."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise GraderUnavailableError(f"the grading process has died: {error}") from error
        return str(self._reply(time.monotonic() + seconds)["verdict"])

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            try:
                stream.close()
            except OSError:  # unsent bytes of a request to a dead process
                continue

    def _reply(self, deadline: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            chunk = os.read(descriptor, 65536) if ready else b""
            if not chunk:
                raise GraderUnavailableError("the grading process has died" if ready else "the grading process hangs")
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return dict(json.loads(line))
