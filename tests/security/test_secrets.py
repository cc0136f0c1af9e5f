"""S7: secrets of the environment, of key files and of the recipe are found nowhere in what a run leaves or shows."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from nemo_opd import session, worker
from nemo_opd.cli import main
from nemo_opd.config import Config
from nemo_opd.configuration.load import load, recorded_yaml, to_yaml
from nemo_opd.engines.vllm.settings import read_key
from nemo_opd.reliability import redact
from nemo_opd.reliability.outcome import read_outcome
from tests.helpers.workspace import make_workspace, workspace_config

CANARIES = ("hf_canaryCanary123", "canary:4567/+==", "canary-of-the-recipe")
"""In the environment; in the environment and the recipe's texts; in the recipe, under a name that says so."""
ENVIRONMENT = {"HF_TOKEN": CANARIES[0], "WANDB_API_KEY": CANARIES[1]}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("secrets"), problems=8)


def found(folder: Path) -> list[str]:
    """Files that hold a canary."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [f"{path.name}: {one}" for path in files for one in CANARIES if one.encode() in path.read_bytes()]


@pytest.mark.slow
def test_a_run_of_two_processes_leaves_none(workspace: Path, tmp_path: Path) -> None:
    """Log and rank logs, metrics, events, samples, outcome, both copies of the configuration; and command lines."""
    run_dir, recipe = tmp_path / "run", tmp_path / "recipe.yaml"
    words = (
        "train.steps=1", "train.processes=2", "observe.rollouts_per_step=4",
        f"data.system_prompt=Use {CANARIES[1]}.", f"data.template_arguments.api_key={CANARIES[2]}",
        "data.max_prompt_tokens=96",
    )  # fmt: skip
    recipe.write_text(to_yaml(workspace_config(workspace, *words, run_dir=run_dir)))
    command = [sys.executable, "-m", "nemo_opd.cli", "train", str(recipe)]
    process = subprocess.Popen(
        command, env={**os.environ, **ENVIRONMENT}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    shown: set[str] = set()
    with process:
        while process.poll() is None:
            for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                try:
                    shown.add(" ".join(one.cmdline()))
                except psutil.Error:
                    continue
            time.sleep(0.05)
        assert process.stdout is not None
        output = process.stdout.read()
    assert process.returncode == 0, output[-3000:]
    assert sum("nemo_opd.worker" in line for line in shown) >= 2
    leaks = found(run_dir) + [one for one in CANARIES if one in output or any(one in line for line in shown)]
    names = {path.name for path in run_dir.rglob("*")}
    assert {"log.txt", "rank-1.txt", "metrics.jsonl", "config.yaml", "outcome.json", "tensorboard"} <= names
    samples = "".join(path.read_text() for path in (run_dir / "rollouts").iterdir())
    assert redact.HIDDEN in samples, "the system prompt is in the samples, so there was something to hide"
    assert leaks == []
    sys.stdout.write(f"S7: {len(CANARIES)} canaries, {len(names)} files, {len(shown)} command lines: found 0\n")


def test_an_error_that_names_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """In the exception's text, in that of its cause, and in its traceback's message."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)

    def fail(config: Config) -> int:
        try:
            raise OSError(f"https://me:{CANARIES[2]}@hub/ refused {CANARIES[0]}")
        except OSError as error:
            raise RuntimeError(f"no access with {CANARIES[1]}, password={CANARIES[2]}") from error

    monkeypatch.setattr(session, "run", fail)
    config = load(None, ["run.dir=-", "student.model=-", "data.path=-", "train.steps=1"], checked=False)
    config.run.dir = str(tmp_path)
    monkeypatch.setenv("NEMO_OPD_ATTEMPT", "a")
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"):
        monkeypatch.delenv(name, raising=False)
    assert worker.run(config) == 70
    outcome = read_outcome(tmp_path)
    assert outcome is not None
    assert outcome.reason == f"RuntimeError: no access with {redact.HIDDEN}, password={redact.HIDDEN}"
    assert "RuntimeError" in (tmp_path / "log.txt").read_text()
    assert found(tmp_path) == []
    assert not any(one in capsys.readouterr().err for one in CANARIES)


def test_a_key_file_s_key_is_hidden_once_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redact, "_remembered", set())
    (tmp_path / "key").touch(mode=0o600)
    (tmp_path / "key").write_text("key-canary-0123\n")
    assert read_key(tmp_path / "key") == "key-canary-0123"
    assert redact.redact("answered 401 to key-canary-0123") == f"answered 401 to {redact.HIDDEN}"


def test_the_configuration_that_is_shown_and_kept(workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """It can still be read; what the run itself reads is not changed."""
    monkeypatch.setenv("WANDB_API_KEY", CANARIES[1])
    words = (f"data.system_prompt=Use {CANARIES[1]}.", f"data.template_arguments.api_key={CANARIES[2]}")
    config = workspace_config(workspace, *words)
    kept = recorded_yaml(config)
    assert not any(one in kept for one in CANARIES)
    path = workspace / "kept.yaml"
    path.write_text(kept)
    assert load(path).data.system_prompt == f"Use {redact.HIDDEN}."
    path.write_text(to_yaml(config))
    assert load(path) == config
    assert main(["train", str(path), "--check"]) == 0
    assert capsys.readouterr().out == kept


def test_an_address_with_a_password_is_refused_and_not_repeated(workspace: Path, capsys) -> None:
    path = workspace / "served.yaml"
    path.write_text(to_yaml(workspace_config(workspace)))
    words = ["loss=policy_gradient", "teacher.engine=vllm", "teacher.servers.urls=http://me:hunter22@node1:8000"]
    assert main(["train", str(path), *words]) == 2
    error = capsys.readouterr().err
    assert "hunter22" not in error
    assert error.startswith("error: teacher.servers.urls: got an address with a name or password in it; expected ")
