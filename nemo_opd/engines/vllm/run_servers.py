"""The servers of a run, which write its rollouts or score them: started by its first process, or standing already."""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import os
import secrets
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from nemo_opd.config import Config, ServersConfig
from nemo_opd.engines.vllm.calls import Servers
from nemo_opd.engines.vllm.local import LocalServers, devices_of
from nemo_opd.engines.vllm.settings import TEACHER, WRITER, ServerSettings, read_key
from nemo_opd.engines.vllm.stock import Stock
from nemo_opd.errors import ConfigError
from nemo_opd.processes import Processes
from nemo_opd.reliability.files import replace_private

log = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")


SCORED_AT_A_TIME = 64
"""Responses that a teacher's server is given at a time."""


class RunServers:
    """Servers of our own load while the run builds its models: make this first, ask for `servers` last."""

    def __init__(
        self, name: str, settings: ServersConfig, server: ServerSettings, run_dir: Path, processes: Processes
    ) -> None:
        """
        Args:
            name: of a server; its log is ``logs/vllm-NAME-0.txt``.
            server: what each of our own is started with, but for what `settings` says.
        """
        self._name, self._settings, self._processes = name, settings, processes
        self._slots, self._weights_dir = server.max_running, server.weights_dir
        self._key_file = settings.key_file
        stock = settings.protocol == "openai"
        self._stock = Stock(Path(server.model), server.role) if stock else None
        self._scratch: Path | None = None
        self._local: LocalServers | None = None
        if settings.urls is None and processes.is_first:
            self._start(server, run_dir)

    def _start(self, server: ServerSettings, run_dir: Path) -> None:
        settings = self._settings
        self._scratch = private_folder(run_dir, self._name)
        self._weights_dir = server.weights_dir or str(self._scratch)
        if self._key_file is None:  # other users of this machine reach the loopback address too
            self._key_file = str(self._scratch / "key")
            replace_private(Path(self._key_file), secrets.token_hex(32) + "\n")
        atexit.register(self.close)  # also when the run fails: weights in shared memory are memory
        self._local = LocalServers(run_dir / "logs", self._scratch)
        server = replace(placed(server, settings), weights_dir=self._weights_dir, key_file=self._key_file)
        for number in range(settings.count):
            devices = devices_of(settings.devices, number, settings.tensor_parallel_size)
            self._local.start(f"{self._name}-{number}", server, devices)

    def servers(self) -> Servers:
        """Addresses, and one session of all processes; waits for servers of our own. Collective.

        Raises: ServerFailed on the first process where a server of ours did not start, RuntimeError on the others.
        ConfigError in a process that cannot reach servers of ours.
        """
        settings, found, failure = self._settings, "", None
        if self._processes.is_first:
            try:
                found = json.dumps([secrets.token_hex(16), self._urls(), self._weights_dir, self._key_file])
            except Exception as error:  # noqa: BLE001 - the others are waiting to hear of it
                failure = error
        answer = self._processes.broadcast_text(found)
        if not answer:
            raise failure or RuntimeError(f"the first process has no {self._name} servers; see its log")
        session, urls, weights_dir, key_file = json.loads(answer)
        if settings.urls is None and not Path(key_file).exists():
            expected = "every process on the machine of the first one, whose servers are on its loopback address"
            way_out = "name servers that all of them reach (servers.urls), or give servers nodes of their own (cluster)"
            raise ConfigError(f"{self._name} servers", "a process on another machine", expected, way_out)
        return Servers(
            urls=urls,
            session=session,
            weights_dir=Path(weights_dir),
            key=read_key(key_file),
            transport=settings.transport,
            sleep=settings.placement == "colocated",
            slots=self._slots,
            stuck_seconds=settings.stuck_seconds,
            load_seconds=settings.load_seconds,
            stock=self._stock,
        )

    def _urls(self) -> list[str]:
        settings = self._settings
        if settings.urls is not None:
            return [url.strip() for url in settings.urls.split(",") if url.strip()]
        assert self._local is not None
        log.info("waiting for %d %s server(s)", settings.count, self._name)
        urls = self._local.urls(settings.start_seconds)
        self._local.watch(settings.restarts)
        return urls

    def close(self) -> None:
        """End servers of our own and remove what lies in shared memory. Idempotent."""
        if self._local is not None:
            self._local.close()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = None


def placed(server: ServerSettings, settings: ServersConfig) -> ServerSettings:
    """What a recipe's section says of a server of our own besides."""
    return replace(
        server,
        key_file=settings.key_file,
        tensor_parallel_size=settings.tensor_parallel_size,
        memory_share=settings.memory_share,
        quantization=settings.quantization,
        cpu_cache_gib=settings.cpu_cache_gib,
        transport=settings.transport,
        sleeps=settings.placement == "colocated",
    )


def writer_servers(config: Config, processes: Processes) -> RunServers:
    """Those of `rollout.servers`."""
    return RunServers("writer", config.rollout.servers, writer_settings(config), Path(config.run.dir), processes)


def writer_settings(config: Config) -> ServerSettings:
    """What a server that writes is started with, but for its section's settings."""
    rollout = config.rollout
    return ServerSettings(
        model=config.student.model,
        role=WRITER,
        ready_file="",
        weights_dir=rollout.servers.weights_dir or "",
        dtype=rollout.dtype,
        max_running=rollout.batch_size,
        max_positions=longest_sequence(config),
    )


def teacher_servers(config: Config, key: str, processes: Processes) -> RunServers:
    """Those of ``teacher.servers``, or of one of several: `key` is a key of `Config.every_teacher`."""
    settings = config.every_teacher()[key].servers
    name = key.replace("teachers.", "teacher-")
    return RunServers(name, settings, teacher_settings(config, key), Path(config.run.dir), processes)


def teacher_settings(config: Config, key: str) -> ServerSettings:
    """What a server of that teacher is started with, but for its section's settings."""
    teacher = config.every_teacher()[key]
    student = json.loads((Path(config.student.model) / "config.json").read_text(encoding="utf-8"))
    return ServerSettings(
        model=str(teacher.model),
        role=TEACHER,
        ready_file="",
        weights_dir="",
        dtype=teacher.dtype,
        max_running=min(SCORED_AT_A_TIME, teacher.micro_batch_tokens),
        batch_tokens=teacher.micro_batch_tokens,
        scored_ids=int(student["vocab_size"]),
    )


def longest_sequence(config: Config) -> int:
    """Positions of the longest prompt with the longest response, in training or evaluation."""
    responses = [config.rollout.max_new_tokens, config.evaluate.max_new_tokens or 0]
    return config.data.max_prompt_tokens + max(responses)


def private_folder(run_dir: Path, name: str) -> Path:
    """A new folder in shared memory that nobody else can read, for what a run passes to its servers of this name. What
    an attempt of the same run left there because it was killed is removed: the run's lock says that none of them is
    alive."""
    place = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else Path(tempfile.gettempdir())
    run = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16]
    prefix = f"nemo_opd-{os.getuid()}-{run}-{name}."  # no name has a dot: one is not the beginning of another
    for leftover in place.glob(f"{prefix}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=prefix, dir=place))
