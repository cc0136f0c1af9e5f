"""Servers of a run's own as processes. Those here are stand-ins: they say that they listen, and wait."""

from __future__ import annotations

import logging
import os
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nemo_opd.engines.vllm import local
from nemo_opd.engines.vllm.local import PYTHON_VARIABLE, LocalServers, ServerFailed, server_python
from nemo_opd.engines.vllm.settings import WRITER, ServerSettings
from nemo_opd.errors import ConfigError

STAND_IN = """#!{python}
import json, os, sys, time
settings = json.load(open(sys.argv[3]))
if settings["model"] == "broken":
    sys.exit("no such model")
with open({log!r}, "a") as log:
    log.write(f"{{os.getpid()}} {{settings['port']}}\\n")
with open(settings["ready_file"], "w") as ready:
    json.dump({{"url": f"http://127.0.0.1:{{settings['port'] or 4242}}"}}, ready)
time.sleep(600)
"""


@pytest.fixture
def servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalServers]:
    program = tmp_path / "python"
    program.write_text(STAND_IN.format(python=sys.executable, log=str(tmp_path / "starts")))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(local.sys, "executable", str(program))
    monkeypatch.setattr(local, "_WATCH_SECONDS", 0.02)
    servers = LocalServers(tmp_path / "logs", tmp_path)
    yield servers
    servers.close()


def settings(model: str = "model") -> ServerSettings:
    return ServerSettings(model=model, role=WRITER, ready_file="", weights_dir="")


def soon(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def starts(tmp_path: Path) -> list[list[int]]:
    return [[int(word) for word in line.split()] for line in (tmp_path / "starts").read_text().splitlines()]


def test_a_server_that_ended_is_started_again_at_its_address_so_often_and_no_more(
    servers: LocalServers, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    servers.start("0", settings())
    assert servers.urls(60.0) == ["http://127.0.0.1:4242"]
    servers.watch(restarts=2)
    with caplog.at_level(logging.ERROR):
        for count in (1, 2, 3):
            soon(lambda count=count: len(starts(tmp_path)) == count)  # type: ignore[misc]
            assert not servers.all_given_up
            os.kill(starts(tmp_path)[-1][0], signal.SIGKILL)
        soon(lambda: "not started again" in caplog.text)
    assert servers.all_given_up
    assert [port for _, port in starts(tmp_path)] == [0, 4242, 4242]
    assert caplog.text.count("is started again; see") == 2


def test_closing_ends_them_for_good(servers: LocalServers, tmp_path: Path) -> None:
    servers.start("0", settings())
    servers.urls(60.0)
    servers.watch(restarts=3)
    process = servers.process("0")
    servers.close()
    assert process.poll() is not None
    time.sleep(0.2)
    assert len(starts(tmp_path)) == 1
    servers.close()


def test_a_server_that_does_not_start_says_why(servers: LocalServers) -> None:
    servers.start("0", settings("broken"))
    with pytest.raises(ServerFailed, match=r"ended \(status 1\) before it listened: see .*\nno such model"):
        servers.urls(60.0)


def test_an_environment_of_their_own(tmp_path: Path) -> None:
    other = tmp_path / "python"
    with pytest.raises(ConfigError, match=r"NEMO_OPD_SERVER_PYTHON: got .*, which cannot be run; expected an interp"):
        server_python({PYTHON_VARIABLE: str(other)})
    other.touch(mode=0o755)
    assert server_python({PYTHON_VARIABLE: str(other)}) == str(other)
    assert server_python({}) == server_python({PYTHON_VARIABLE: ""}) == sys.executable
