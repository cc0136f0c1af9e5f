"""S8: every route of a server wants the key, no other route exists, and without a key it listens to this machine alone.

The same is asked of real vLLM servers in tests/reliability/test_rollout_servers.py and test_teacher_servers.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from starlette.routing import Route

from nemo_opd.engines.vllm.server import application
from nemo_opd.engines.vllm.settings import TEACHER, WRITER, ServerSettings, read_key
from tests.helpers.teachers import StandIn, standing

KEY = "the right key"
OURS = {
    WRITER: {"/health", "/attach", "/generate", "/refit", "/transfer", "/sleep"},
    TEACHER: {"/health", "/attach", "/score"},
}
"""All that exists."""
THEIRS = (
    *("/", "/docs", "/redoc", "/openapi.json", "/metrics", "/ping", "/version", "/load", "/tokenize", "/detokenize"),
    *(
        "/v1/models",
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/embeddings",
        "/v1/responses",
        "/pooling",
        "/rerank",
    ),
    *("/collective_rpc", "/pause", "/resume", "/wake_up", "/is_sleeping", "/reset_prefix_cache", "/invocations"),
    *("/update_weights", "/init_weight_transfer_engine", "/server_info", "/start_profile", "/scale_elastic_ep"),
    *("//health", "/health/", "/HEALTH", "/health%2f", "/static/x", "/.env"),
)
"""What vLLM's own server has, and other spellings."""
WRONG: tuple[dict[str, str], ...] = (
    {},
    {"authorization": ""},
    {"authorization": "Bearer"},
    {"authorization": "Bearer another"},
    {"authorization": f"Bearer {KEY}x"},
    {"authorization": f"Bearer {KEY[:-1]}"},
    {"authorization": f"bearer{KEY}"},
    {"authorization": KEY},
    {"authorization": f"Basic {KEY}"},
    {"x-api-key": KEY},
    {"cookie": f"authorization=Bearer {KEY}"},
)


class Served(StandIn):
    """Counts what gets through to it."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self.settings = replace(self.settings, role=role)
        self.reached = 0

    def __getattribute__(self, name: str) -> object:
        if name in ("attach", "generate", "refit", "transfer", "sleep", "score", "health"):
            self.reached += 1
        return object.__getattribute__(self, name) if name != "generate" else object.__getattribute__(self, "score")


@pytest.mark.parametrize("role", OURS)
def test_no_route_is_open(role: str) -> None:
    served = Served(role)
    routes = [route for route in application(served, KEY).routes if isinstance(route, Route)]
    assert {route.path for route in routes} == OURS[role]
    asked = 0
    with standing(served, KEY) as url, httpx.Client(base_url=url, timeout=30) as client:
        served.reached = 0
        for path in OURS[role]:
            for headers in WRONG:
                for method in ("GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH"):
                    answer = client.request(method, path, headers=headers, content=b"{}")
                    assert answer.status_code in (401, 405), (method, path, headers, answer.status_code)
                    asked += 1
        for path in THEIRS:
            for headers in ({}, {"authorization": f"Bearer {KEY}"}):
                for method in ("GET", "POST"):
                    answer = client.request(method, path, headers=headers, content=b"{}", follow_redirects=False)
                    assert answer.status_code in (401, 404, 405, 307), (method, path, answer.status_code)
                    assert answer.status_code != 307 or answer.headers["location"].startswith(url)
                    asked += 1
        assert served.reached == 0, "open routes 0"
        assert client.get("/health", headers={"authorization": f"Bearer {KEY}"}).status_code == 200
    sys.stdout.write(f"S8: {role}: {asked} requests without the key or to other routes, answered 0\n")


@pytest.mark.parametrize(
    "host",
    ["0.0.0.0", "::", "", "*", "0", "node7", "10.0.0.1", "127.0.0.1.example.org", "localhost.", "::ffff:10.0.0.1"],
)
def test_a_host_that_others_reach_wants_a_key(host: str) -> None:
    settings = ServerSettings(model="m", role=WRITER, ready_file="r", weights_dir="w", host=host)
    with pytest.raises(ValueError, match="without a key"):
        ServerSettings.from_json(settings.to_json())
    assert ServerSettings.from_json(replace(settings, key_file="key").to_json()).host == host


@pytest.mark.parametrize("key", [None, "missing", "readable", "empty"])
def test_a_server_does_not_start_without_its_key(tmp_path: Path, key: str | None) -> None:
    """The real program: it ends before it listens or loads anything."""
    file = tmp_path / "key"
    if key in ("readable", "empty"):
        file.write_text("" if key == "empty" else "secret of a server")
        file.chmod(0o600 if key == "empty" else 0o644)
    settings = ServerSettings(str(tmp_path), WRITER, str(tmp_path / "ready"), str(tmp_path), host="0.0.0.0")
    settings = replace(settings, key_file=None if key is None else str(file))
    (tmp_path / "settings.json").write_text(settings.to_json())
    command = [sys.executable, "-m", "nemo_opd.engines.vllm.server", str(tmp_path / "settings.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0 and not (tmp_path / "ready").exists()
    words = {None: "without a key", "missing": "No such file", "readable": "chmod 600", "empty": "it is empty"}
    assert words[key] in done.stderr and "secret of a server" not in done.stderr


def test_a_key_stands_in_no_settings_file_and_on_no_command_line(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.touch(mode=0o600)
    file.write_text("secret of a server")
    settings = ServerSettings("m", WRITER, "r", "w", key_file=str(file))
    assert read_key(settings.key_file) == "secret of a server"
    assert "secret of a server" not in settings.to_json()
    assert "secret" not in json.dumps(list(ServerSettings.__dataclass_fields__))
