"""Real stock vLLM servers for tests: vLLM's own HTTP server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import httpx

from nemo_opd.engines.vllm.server import ENVIRONMENT
from tests.helpers.servers import KEY, START_SECONDS, free_port, need_vllm

_NOT_OURS = "VLLM_ENABLE_V1_MULTIPROCESSING"
"""This server's engine is a process of its own."""


class StockServer:
    """One server of `model`, which has a key and, if `managed`, management routes; ended afterwards."""

    def __init__(self, model: Path, log: Path, arguments: Sequence[str] = (), managed: bool = True) -> None:
        need_vllm()
        self.model, self._log, self._arguments, self._managed = model, log, arguments, managed
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Returns when it listens."""
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.model)]
        command += ["--host", "127.0.0.1", "--port", str(self._port), "--api-key", KEY, "--dtype", "float32"]
        command += ["--skip-tokenizer-init", "--enforce-eager", *self._arguments]
        chosen = {name: value for name, value in ENVIRONMENT.items() if name != _NOT_OURS}
        chosen |= {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1"}
        chosen["VLLM_SERVER_DEV_MODE"] = str(int(self._managed))
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, **chosen}, start_new_session=True
            )
        end = time.monotonic() + START_SECONDS
        while not self._listens():
            assert self._process.poll() is None and time.monotonic() < end, self._log.read_text()[-2000:]
            time.sleep(0.3)

    def _listens(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=1.0, trust_env=False).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    def kill(self) -> None:
        """With the engine, which is a process of its own."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
