"""Packages, disk and servers: what the machine tells."""

from __future__ import annotations

import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from nemo_opd.doctor import network
from nemo_opd.doctor.disk import (
    disk_findings,
    existing,
    model_bytes,
    parameter_count,
    room,
    shared_room,
    synced,
    written,
)
from nemo_opd.doctor.finding import Verdict
from nemo_opd.doctor.installed import FLOORS, installed_version, packages, python, unsafe, version_findings
from tests.helpers.servers import free_port
from tests.helpers.teachers import StandIn, standing
from tests.helpers.workspace import make_workspace, workspace_config

NAMED = (
    "torch==2.13.0",
    "engine>=2.9,<2.12; extra == 'gpu'",
    "vllm==0.32.0; extra == 'vllm'",
    "pytest==9.2.0; extra == 'dev'",
)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("machine"), problems=4)


@pytest.mark.parametrize(
    ("have", "vllm", "wrong"),
    [
        ({"torch": "2.13.0"}, False, {}),
        ({"torch": "2.13.0+cpu", "engine": "2.10.1", "vllm": "0.32.0"}, True, {}),
        ({"torch": "2.14.0"}, False, {"torch": "warn"}),
        ({}, False, {"torch": "fail"}),
        ({"torch": "2.13.0", "engine": "2.8"}, False, {"engine": "fail"}),
        ({"torch": "2.13.0", "engine": "2.12"}, False, {"engine": "warn"}),
        ({"torch": "2.13.0", "pytest": "1"}, False, {}),
        ({"torch": "2.13.0"}, True, {"vllm": "fail"}),
        ({"torch": "2.13.0", "vllm": "0.33.0"}, True, {"vllm": "warn"}),
    ],
)
def test_packages_against_what_is_named(have: dict[str, str], vllm: bool, wrong: dict[str, str]) -> None:
    first, *rows = packages(NAMED, vllm, have.get)
    assert first.verdict is Verdict.OK
    assert {row.name.removeprefix("versions: "): row.verdict.value for row in rows} == wrong
    assert all(row.way_out for row in rows)


@pytest.mark.parametrize("name", FLOORS)
def test_a_package_with_a_known_hole_fails(name: str) -> None:
    floor, reason = FLOORS[name]
    parts = [int(part) for part in floor.split(".")]
    parts[max(n for n, part in enumerate(parts) if part)] -= 1
    before = ".".join(map(str, parts))
    for have in (before, f"{floor}rc1", f"{before}+cpu"):
        (row,) = unsafe({name: have}.get)
        assert (row.name, row.verdict, row.found) == (f"versions: {name}", Verdict.FAIL, have)
        assert reason in (row.bound or "") and f"{name}>={floor}" in row.way_out
    for have in (floor, f"{floor}+cpu", "1000"):
        assert [row.verdict for row in unsafe({name: have}.get)] == [Verdict.OK]
    assert [row.verdict for row in unsafe({}.get)] == [Verdict.OK]


def test_no_pin_lies_below_a_floor() -> None:
    pins = {canonicalize_name(one.name): one for one in map(Requirement, requires("nemo_opd") or [])}
    for name, (floor, _) in FLOORS.items():
        if name in pins:
            assert all(Version(pin.version) >= Version(floor) for pin in pins[name].specifier), name


def test_this_environment(workspace: Path) -> None:
    """What `make env` installs is what pyproject.toml names."""
    assert {row.verdict for row in version_findings(workspace_config(workspace))} == {Verdict.OK}
    assert python(">=99").verdict is Verdict.FAIL
    assert installed_version("no-such-package") is None


def test_the_disk(workspace: Path, tmp_path: Path) -> None:
    config = workspace_config(workspace, run_dir=tmp_path / "deep" / "run")
    assert {row.verdict for row in disk_findings(config)} == {Verdict.OK}
    assert existing(Path(config.run.dir)) == tmp_path and list(tmp_path.iterdir()) == [], "nothing is left there"
    assert written(Path("/proc")).verdict is Verdict.FAIL
    assert synced(tmp_path).verdict is Verdict.OK


def test_room_for_checkpoints(workspace: Path) -> None:
    student = workspace / "student"
    count = parameter_count(student)
    assert count * 4 < model_bytes(student) < count * 4 + 20_000
    config = workspace_config(workspace, "checkpoint.keep=3")
    needed = 4 * count * 16 + model_bytes(student)
    assert room(config, needed).verdict is Verdict.OK and room(config, needed - 1).verdict is Verdict.FAIL
    assert shared_room(config, 8 * count).verdict is Verdict.OK
    assert shared_room(config, 8 * count - 1).verdict is Verdict.FAIL


def test_servers_that_stand_already(workspace: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.touch(mode=0o600)
    key.write_text("secret")
    served, busy = StandIn(), StandIn()
    busy.health = lambda: {"status": "ready", "steps": 4, "running": 3}  # type: ignore[method-assign]
    gone = f"http://127.0.0.1:{free_port()}"
    with standing(served, "secret") as one, standing(busy, "secret") as two:
        config = workspace_config(
            workspace,
            *("loss=policy_gradient", "teacher.engine=vllm", f"teacher.servers.urls={one},{two},{gone}"),
            f"teacher.servers.key_file={key}",
        )
        verdicts = {row.name.rpartition(" ")[2]: row.verdict for row in network.network_findings(config)}
        assert verdicts == {"loopback": Verdict.OK, one: Verdict.OK, two: Verdict.WARN, gone: Verdict.FAIL}
        key.write_text("another")
        assert network.answers("x", one, "another").verdict is Verdict.FAIL
        key.chmod(0o644)
        assert [row.verdict for row in network.network_findings(config)][1:] == [Verdict.FAIL]
    unused = replace(config, teacher=replace(config.teacher, engine="megatron"))
    assert len(network.network_findings(unused)) == 1


class Models(BaseHTTPRequestHandler):
    """What of a stock vLLM server is looked at."""

    def do_GET(self) -> None:
        has_key = self.headers.get("authorization") == "Bearer secret"
        body = b'{"data": [{"id": "m"}]}' if has_key else b'{"error": "Unauthorized"}'
        self.send_response(200 if has_key else 401)
        self.end_headers()
        self.wfile.write(body if self.path == "/v1/models" else b"")

    def log_message(self, *_: object) -> None:
        pass


def test_a_stock_server_says_what_it_serves(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with HTTPServer(("127.0.0.1", 0), Models) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert network.stock_answers("x", url, "another").verdict is Verdict.FAIL
        (tmp_path / "key").touch(mode=0o600)
        (tmp_path / "key").write_text("secret")
        given = {
            "engine": "vllm",
            "servers.urls": url,
            "servers.protocol": "openai",
            "servers.key_file": tmp_path / "key",
        }
        words = [f"teacher.{name}={value}" for name, value in given.items()]
        row = network.network_findings(workspace_config(workspace, "loss=policy_gradient", *words))[-1]
        assert (row.verdict, row.found) == (Verdict.OK, "serves m")
        server.shutdown()
    assert network.stock_answers("x", url, "secret").verdict is Verdict.FAIL
