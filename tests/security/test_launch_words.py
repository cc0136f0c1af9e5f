"""S11: names of runs, recipes, models and data reach processes as they were written, and no shell.

slurm/ has its own words in tests/unit/test_slurm_script.py; that no module of the package starts a shell is S1.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from nemo_opd.configuration.load import load, to_yaml
from nemo_opd.engines.vllm.local import LocalServers
from nemo_opd.engines.vllm.settings import WRITER, ServerSettings
from nemo_opd.launch import start
from tests.helpers.workspace import make_workspace, workspace_config

HOSTILE = [
    "$(touch canary)",
    "`touch canary`",
    "a; touch canary; b",
    "a\ntouch canary\n",
    "a && touch canary || x",
    "a | touch canary > canary",
    "'\"'; touch canary; '\"'",
    "-c 'touch canary'",
    "--help",
    "$IFS;touch$IFS canary",
    "%(prog)s {canary} %s",
    "\\$(touch canary)\\n",
]
RECORDER = """#!{python}
import os, sys
with open(os.environ["RECORD"], "ab") as file:
    file.write(b"\\0".join(map(os.fsencode, sys.argv[1:])) + b"\\0\\0")
    for word in sys.argv[1:]:
        if word.endswith((".yaml", ".json")) and os.path.exists(word):
            file.write(b"FILE " + open(word, "rb").read() + b"\\0\\0")
"""


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Python is a program that writes down what it was started with; nothing else can write a canary."""
    program, record = tmp_path / "python", tmp_path / "record"
    program.write_text(RECORDER.format(python=sys.executable))
    program.chmod(0o755)
    (tmp_path / "place").mkdir()
    monkeypatch.chdir(tmp_path / "place")
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setenv("RECORD", str(record))
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"):
        monkeypatch.delenv(name, raising=False)
    return record


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("words"), problems=8)


@pytest.mark.parametrize("word", HOSTILE)
def test_every_field_of_a_run_that_starts_processes(word: str, workspace: Path, recorded: Path) -> None:
    base = Path(f"x{word}".replace("/", "_"))
    base.mkdir()
    for name in ("student", "teacher", "train.jsonl"):
        (base / f"{name}{word}").symlink_to(workspace / name)
    config = workspace_config(workspace, "train.processes=2", f"data.system_prompt={word}", run_dir=base / "run")
    config.student.model, config.teacher.model = str(base / f"student{word}"), str(base / f"teacher{word}")
    recipe = base / "recipe.yaml"
    recipe.write_text(to_yaml(config))
    again = load(recipe, [f"data.system_prompt={word}"])
    assert again == config
    assert start(config) == 70, "the recorder leaves no outcome"
    command, recipe_of_the_run = recorded.read_bytes().split(b"\0\0")[:2]
    words = command.split(b"\0")
    assert words[:2] == [b"-m", b"torch.distributed.run"] and words[-3:-1] == [b"-m", b"nemo_opd.worker"]
    assert os.fsdecode(words[-1]).startswith(str(base / "run" / "control" / "recipe-"))
    (base / "read.yaml").write_bytes(recipe_of_the_run.removeprefix(b"FILE "))
    assert load(base / "read.yaml") == config
    assert list(Path.cwd().rglob("canary")) == [], "executed 0"


@pytest.mark.parametrize("word", HOSTILE)
def test_every_field_of_a_server(word: str, tmp_path: Path, recorded: Path) -> None:
    place = tmp_path / f"x{word}".replace("/", "_")
    place.mkdir()
    settings = ServerSettings(f"model{word}", WRITER, "", f"weights{word}", host=f"h{word}", key_file=f"key{word}")
    servers = LocalServers(place / "logs", place)
    try:
        servers.start("writer-0", settings, {"CUDA_VISIBLE_DEVICES": word})
        servers.process("writer-0").wait(30)
    finally:
        servers.close()
    command, file = recorded.read_bytes().split(b"\0\0")[:2]
    assert command.split(b"\0")[:2] == [b"-m", b"nemo_opd.engines.vllm.server"]
    found = ServerSettings.from_json(file.removeprefix(b"FILE ").decode())
    assert (found.model, found.weights_dir, found.host) == (settings.model, settings.weights_dir, settings.host)
    assert list(tmp_path.rglob("canary")) == [], "executed 0"
