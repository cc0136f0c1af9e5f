"""Servers that a run starts itself, on this machine, and ends with itself."""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from nemo_opd.engines.vllm.settings import ServerSettings
from nemo_opd.errors import ConfigError
from nemo_opd.reliability.files import private_descriptor, private_folder, write_private
from nemo_opd.types import StopRequested

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.2
_WATCH_SECONDS = 1.0
_END_SECONDS = 10.0
_TAIL = 15
"""Lines of the log of a server that did not start which are shown."""


PYTHON_VARIABLE = "NEMO_OPD_SERVER_PYTHON"
"""Names the interpreter of servers, where vLLM and the trainer want different versions of torch and each has an
environment of its own (as in our Dockerfile). Not a setting of recipes, which run no code."""


def server_python(environment: Mapping[str, str] = os.environ) -> str:
    """The interpreter that servers are started with: this process's own unless the variable names another.

    Raises ConfigError where that cannot be run.
    """
    named = environment.get(PYTHON_VARIABLE)
    if named and not os.access(named, os.X_OK):
        expected = "an interpreter with vLLM and nemo_opd"
        raise ConfigError(PYTHON_VARIABLE, f"{named}, which cannot be run", expected, "correct or unset it")
    return named or sys.executable


class ServerFailed(RuntimeError):
    """A server of ours ended before it listened, or did not listen in time."""


class LocalServers:
    """Processes of their own: one that dies takes nothing with it."""

    def __init__(self, logs: Path, scratch: Path) -> None:
        """`logs`: folder of ``vllm-NAME.txt``; `scratch`: an existing folder for settings and addresses."""
        self._logs, self._scratch = logs, scratch
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._ready: dict[str, Path] = {}
        self._started: dict[str, tuple[ServerSettings, Mapping[str, str] | None]] = {}
        self._restarts: dict[str, int] = {}
        self._given_up: set[str] = set()
        self._closing = threading.Event()
        self._changing = threading.Lock()

    def start(self, name: str, settings: ServerSettings, environment: Mapping[str, str] | None = None) -> None:
        """Start the server `name`, which must not be running; it loads while the caller goes on.

        `environment` is put above this process's own. ``ready_file`` of the settings is set here.
        """
        assert name not in self._processes or self._processes[name].poll() is not None, name
        token = secrets.token_hex(4)
        ready, file = self._scratch / f"{name}-{token}.ready", self._scratch / f"{name}-{token}.json"
        write_private(file, replace(settings, ready_file=str(ready)).to_json())
        private_folder(self._logs)
        with os.fdopen(private_descriptor(self._log(name), os.O_WRONLY | os.O_APPEND), "ab") as log:
            self._processes[name] = subprocess.Popen(
                [server_python(), "-m", "nemo_opd.engines.vllm.server", str(file)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's Ctrl-C is for us, and what it starts ends with it
                env={**os.environ, **(environment or {})},
            )
        self._ready[name] = ready
        self._started[name] = settings, environment

    def watch(self, restarts: int) -> None:
        """From now on a server that ended is started again, at the address that it had, at most `restarts` times each.
        Call it when all of them listen."""
        for name, ready in self._ready.items():
            settings, environment = self._started[name]
            port = urlsplit(json.loads(ready.read_text())["url"]).port
            assert port is not None
            self._started[name] = replace(settings, port=port), environment
        threading.Thread(target=self._watch, args=(restarts,), name="server watch", daemon=True).start()

    def _watch(self, restarts: int) -> None:
        while not self._closing.wait(_WATCH_SECONDS):
            for name in set(self._processes) - self._given_up:
                with self._changing:
                    status = self._processes[name].poll()
                    if status is None or self._closing.is_set():
                        continue
                    made = self._restarts.get(name, 0)
                    if made == restarts:
                        self._given_up.add(name)
                        log.error("the server %s ended (status %s) for the %d. time; it is not started again: %s",
                                  name, status, made + 1, self._end_of_log(name))  # fmt: skip
                        continue
                    log.error("the server %s ended (status %s) and is started again; see %s", name, status,
                              self._log(name))  # fmt: skip
                    self._restarts[name] = made + 1
                    self.start(name, *self._started[name])

    def urls(self, seconds: float, stop_requested: StopRequested = lambda: False) -> list[str]:
        """Addresses of all servers in the order of their start, once they listen; fewer when a stop is requested.

        Raises ServerFailed for one that ended, or does not listen within `seconds`.
        """
        end = time.monotonic() + seconds
        found: list[str] = []
        for name, ready in self._ready.items():
            while not ready.exists():
                if (status := self._processes[name].poll()) is not None:
                    raise ServerFailed(
                        f"the server {name} ended (status {status}) before it listened: {self._end_of_log(name)}"
                    )
                if time.monotonic() > end:
                    raise ServerFailed(
                        f"the server {name} does not listen after {seconds:g} s: {self._end_of_log(name)}"
                    )
                if stop_requested():
                    return found
                time.sleep(_LOOK_SECONDS)
            found.append(str(json.loads(ready.read_text())["url"]))
        return found

    @property
    def all_given_up(self) -> bool:
        """Has every server that is watched ended more often than it is started again?"""
        return bool(self._processes) and self._given_up == set(self._processes)

    def process(self, name: str) -> subprocess.Popen[bytes]:
        """The server itself."""
        return self._processes[name]

    def close(self) -> None:
        """End all servers: asked first, then killed with all that they started. Idempotent."""
        self._closing.set()
        with self._changing:
            self._end()

    def _end(self) -> None:
        for process in self._processes.values():
            if process.poll() is None:
                process.terminate()
        end = time.monotonic() + _END_SECONDS
        for process in self._processes.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _log(self, name: str) -> Path:
        return self._logs / f"vllm-{name}.txt"

    def _end_of_log(self, name: str) -> str:
        lines = self._log(name).read_text(errors="replace").splitlines()[-_TAIL:]
        return "\n".join([f"see {self._log(name)}, which ends with", *lines])


def devices_of(devices: str | None, number: int, each: int) -> dict[str, str]:
    """Environment of server `number` that uses `each` GPUs of the list `devices`, ``"0,1,2,3"``; None: all it sees."""
    if devices is None:
        return {}
    ids: Sequence[str] = devices.split(",")
    return {"CUDA_VISIBLE_DEVICES": ",".join(ids[number * each : (number + 1) * each])}
