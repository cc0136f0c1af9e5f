"""One node's servers, with a stand-in for vLLM's process; tests/slurm/test_servers.py has the real one."""

from __future__ import annotations

import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_opd.cluster import serve
from nemo_opd.cluster.plan import Plan, url_file
from nemo_opd.config import ServersConfig
from nemo_opd.engines.vllm import local
from nemo_opd.engines.vllm.local import LocalServers, ServerFailed
from tests.unit.cluster.test_plan import config_of, plan_of

STAND_IN = """#!{python}
import json, os, sys, time
settings = json.load(open(sys.argv[3]))
port = settings["port"] or 4242
with open({log!r}, "a") as log:
    log.write(f"{{os.getpid()}} {{settings['host']}} {{settings['port']}}\\n")
with open(settings["ready_file"], "w") as ready:
    json.dump({{"url": f"http://{{settings['host']}}:{{port}}"}}, ready)
time.sleep(600)
"""


class Node:
    """A node that serves in a thread."""

    def __init__(self, folder: Path) -> None:
        words = [f"rollout.servers.key_file={folder}/key", f"rollout.servers.weights_dir={folder}"]
        (folder / "key").write_text("a key\n")
        self.plan: Plan = plan_of(folder, {"trainer": ("a",), "rollout": ("b",)})
        self.plan.folder.mkdir(parents=True)
        self._folder = folder
        self._config = config_of(
            folder, "rollout.engine=vllm", "cluster.rollout_nodes=1", "rollout.servers.restarts=1", *words
        )
        self.codes: list[int] = []

    def start(self) -> LocalServers:
        servers = LocalServers(self._folder / "logs", self._folder)
        threading.Thread(target=self._serve, args=(servers,), daemon=True).start()
        return servers

    def _serve(self, servers: LocalServers) -> None:
        code = serve._serve(self.plan, self._config, "rollout", "b", servers, str(self._folder))
        servers.close()
        self.codes.append(code)

    @property
    def starts(self) -> list[list[str]]:
        """Process, host and port of each start of a server."""
        log = self._folder / "starts"
        return [line.split() for line in log.read_text().splitlines()] if log.exists() else []

    @property
    def urls(self) -> str:
        path = url_file(self.plan, "rollout", "b")
        return path.read_text() if path.exists() else ""


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    program = tmp_path / "python"
    program.write_text(STAND_IN.format(python=sys.executable, log=str(tmp_path / "starts")))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(local.sys, "executable", str(program))
    monkeypatch.setattr(local, "_WATCH_SECONDS", 0.02)
    monkeypatch.setattr(serve, "_LOOK_SECONDS", 0.02)
    node = Node(tmp_path)
    yield node
    (node.plan.folder / "ended").touch()
    soon(lambda: bool(node.codes))


def soon(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_it_says_its_addresses_and_ends_with_the_job(node: Node) -> None:
    servers = node.start()
    soon(lambda: node.urls != "")
    assert node.urls == "http://10.0.0.1:4242\n"
    (node.plan.folder / "ended").touch()
    soon(lambda: node.codes == [0])
    assert servers.process("rollout-b-0").poll() is not None


def test_a_node_that_serves_again_does_so_at_the_same_addresses(node: Node) -> None:
    url_file(node.plan, "rollout", "b").write_text("http://10.0.0.1:4343\n")
    node.start()
    soon(lambda: len(node.starts) == 1)
    assert node.starts[0][1:] == ["10.0.0.1", "4343"]


@pytest.mark.parametrize(
    ("words", "visible", "expected"),
    [
        ({}, "4,5", None),
        ({"count": 2, "tensor_parallel_size": 2}, "", "0,1,2,3"),
        ({"count": 2, "tensor_parallel_size": 2}, "4,5,6,7", "4,5,6,7"),
        ({"count": 2}, "2, 3,4", "2,3"),
        ({"count": 2, "devices": "6,7"}, "0,1", "6,7"),
    ],
)
def test_every_server_of_a_node_has_gpus_of_its_own(words: dict[str, Any], visible: str, expected: str | None) -> None:
    assert serve.node_devices(ServersConfig(**words), {"CUDA_VISIBLE_DEVICES": visible}) == expected


def test_a_node_with_fewer_gpus_than_its_servers_use() -> None:
    with pytest.raises(ServerFailed, match="4 GPUs for 2 servers, and this node's step sees 0,1,2"):
        serve.node_devices(ServersConfig(count=2, tensor_parallel_size=2), {"CUDA_VISIBLE_DEVICES": "0,1,2"})


def test_it_gives_up_with_its_last_server(node: Node) -> None:
    node.start()
    for count in (1, 2):
        soon(lambda count=count: len(node.starts) == count and node.urls != "")  # type: ignore[misc]
        os.kill(int(node.starts[-1][0]), signal.SIGKILL)
    soon(lambda: node.codes == [1])
