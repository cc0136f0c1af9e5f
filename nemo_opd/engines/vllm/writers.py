"""The servers that write a run's rollouts: started by its first process, or standing already."""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import os
import secrets
import shutil
import tempfile
from pathlib import Path

from nemo_opd.config import Config
from nemo_opd.engines.vllm.generator import Servers
from nemo_opd.engines.vllm.local import LocalServers, devices_of
from nemo_opd.engines.vllm.settings import WRITER, ServerSettings, read_key
from nemo_opd.processes import Processes

log = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")


class WriterServers:
    """Servers of our own load while the run builds its models: make this first, ask for `servers` last."""

    def __init__(self, config: Config, processes: Processes) -> None:
        self._config, self._processes = config, processes
        self._scratch: Path | None = None
        self._local: LocalServers | None = None
        if config.rollout.servers.urls is None and processes.is_first:
            self._start()

    def _start(self) -> None:
        settings, rollout = self._config.rollout.servers, self._config.rollout
        run_dir = Path(self._config.run.dir)
        self._scratch = private_folder(run_dir)
        atexit.register(self.close)  # also when the run fails: weights in shared memory are memory
        self._local = LocalServers(run_dir / "logs", self._scratch)
        server = ServerSettings(
            model=self._config.student.model,
            role=WRITER,
            ready_file="",
            weights_dir=str(settings.weights_dir or self._scratch),
            dtype=rollout.dtype,
            key_file=settings.key_file,
            max_running=rollout.batch_size,
            max_positions=longest_sequence(self._config),
            tensor_parallel_size=settings.tensor_parallel_size,
            memory_share=settings.memory_share,
            cpu_cache_gib=settings.cpu_cache_gib,
        )
        for number in range(settings.count):
            devices = devices_of(settings.devices, number, settings.tensor_parallel_size)
            self._local.start(f"writer-{number}", server, devices)

    def servers(self) -> Servers:
        """Addresses, and one session of all processes; waits for servers of our own. Collective.

        Raises: ServerFailed on the first process where a server of ours did not start, RuntimeError on the others.
        """
        settings, found, failure = self._config.rollout.servers, "", None
        if self._processes.is_first:
            try:
                found = json.dumps([secrets.token_hex(16), self._urls(), str(settings.weights_dir or self._scratch)])
            except Exception as error:  # noqa: BLE001 - the others are waiting to hear of it
                failure = error
        answer = self._processes.broadcast_text(found)
        if not answer:
            raise failure or RuntimeError("the first process has no rollout servers; see its log")
        session, urls, weights_dir = json.loads(answer)
        return Servers(
            urls=urls,
            session=session,
            weights_dir=Path(weights_dir),
            key=read_key(settings.key_file),
            slots=self._config.rollout.batch_size,
            stuck_seconds=settings.stuck_seconds,
            load_seconds=settings.load_seconds,
        )

    def _urls(self) -> list[str]:
        settings = self._config.rollout.servers
        if settings.urls is not None:
            return [url.strip() for url in settings.urls.split(",") if url.strip()]
        assert self._local is not None
        log.info("waiting for %d rollout server(s)", settings.count)
        return self._local.urls(settings.start_seconds)

    def close(self) -> None:
        """End servers of our own and remove what lies in shared memory. Idempotent."""
        if self._local is not None:
            self._local.close()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = None


def longest_sequence(config: Config) -> int:
    """Positions of the longest prompt with the longest response, in training or evaluation."""
    responses = [config.rollout.max_new_tokens, config.evaluate.max_new_tokens or 0]
    return config.data.max_prompt_tokens + max(responses)


def private_folder(run_dir: Path) -> Path:
    """A new folder in shared memory that nobody else can read, for what a run passes to its servers. What an attempt of
    the same run left there because it was killed is removed: the run's lock says that none of them is alive."""
    place = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else Path(tempfile.gettempdir())
    name = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16]
    prefix = f"nemo_opd-{os.getuid()}-{name}-"
    for leftover in place.glob(f"{prefix}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=prefix, dir=place))
