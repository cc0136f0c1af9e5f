"""S4: a recipe is data. Files that are more than that, or other data than the schema's, are refused within a second,
with the line and the key, and nothing of them is run or built."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from nemo_opd.cli import main
from tests.unit.configuration.workspace import make_workspace

RECIPE = """\
run: {{dir: run}}
student: {{model: student}}
teacher: {{model: teacher}}
data: {{path: train.jsonl, max_prompt_tokens: 64}}
rollout: {{max_new_tokens: 64}}
train:
  steps: {steps}
{more}"""


@dataclass(frozen=True)
class Hostile:
    """What stands in line 7 as `train.steps`, or from line 8 on; `at`: what the message names beside the line."""

    name: str
    at: str
    steps: str = "1"
    more: str = ""
    line: int = 7


def bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join(f'*a{n - 1}' for _ in range(10))}]" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


PYTHON = {
    "object/apply": "!!python/object/apply:os.system ['touch canary']",
    "object/new": "!!python/object/new:os.system ['touch canary']",
    "object": "!!python/object:subprocess.Popen {args: [touch, canary]}",
    "name": "!!python/name:os.system",
    "module": "!!python/module:antigravity",
    "tuple": "!!python/tuple [1, 2]",
    "long form": "!<tag:yaml.org,2002:python/object/apply:os.system> ['touch canary']",
    "CVE-2020-14343": "!!python/object/new:tuple [!!python/object/new:map [!!python/name:eval , ['open(canary)']]]",
}

FILES = [
    *(Hostile(f"python/{name}", "`train.steps`", steps=text) for name, text in PYTHON.items()),
    Hostile("a tag of its own", "`train.steps`", steps="!shell touch canary"),
    Hostile("binary", "`train.steps`", steps="!!binary dG91Y2ggY2FuYXJ5"),
    Hostile("a tag on a key", "tag:yaml.org,2002:python/name:os.system", more="!!python/name:os.system : 1\n", line=8),
    Hostile("_target_", "_target_", more="loss: {_target_: os.system, command: touch canary}\n", line=8),
    Hostile("_target_ deep inside", "_target_", more="loss:\n  name: tail\n  k:\n    _target_: os.system\n", line=11),
    Hostile("a reference to the environment", "train.steps", steps="${oc.env:HOME}"),
    Hostile("an unknown key", "optimizer.shell", more="optimizer: {shell: touch canary}\n", line=8),
    Hostile("an unknown section", "hooks", more="hooks: {start: touch canary}\n", line=8),
    Hostile("a key twice", "run", more="run: {dir: elsewhere}\n", line=8),
    Hostile("a key twice inside", "optimizer.lr", more="optimizer:\n  lr: 1\n  lr: 2\n", line=10),
    Hostile("another type", "train.steps", steps="many"),
    Hostile("a list for a number", "train.steps", steps="[1, 2]"),
    Hostile("not a number", "optimizer.lr", more="optimizer: {lr: .nan}\n", line=8),
    Hostile("a merge key", "`optimizer.<<`", more="optimizer: {<<: *x}\n", line=8),
    Hostile("10^6-fold alias", "`a0`", more=bomb(6), line=8),
    Hostile("an alias of itself", "`a`", more="a: &a [*a]\n", line=8),
    Hostile("deep nesting", "more than 16 levels at `run`", more="run: " + "[" * 50_000 + "\n", line=8),
    Hostile("a second document", "document", more="---\nrun: {dir: elsewhere}\n", line=8),
    Hostile("a tag without its directive", "undefined tag handle", more="x: !y!z 1\n", line=8),
    Hostile("a null byte", "special characters", more="x: '\0'\n", line=0),
    Hostile("a list as a key", "a list or mapping as a key", more="? [a, b]\n: 1\n", line=8),
]


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"):
        monkeypatch.delenv(name, raising=False)
    make_workspace(tmp_path)
    return tmp_path


def test_the_files_differ_from_an_accepted_one_in_that_alone(workspace: Path) -> None:
    (workspace / "recipe.yaml").write_text(RECIPE.format(steps="1", more=""))
    assert main(["train", "recipe.yaml", "--check"]) == 0


def test_every_file_is_refused_with_key_and_line(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = []
    before = {path.name for path in workspace.iterdir()} | {"recipe.yaml"}
    for file in FILES:
        (workspace / "recipe.yaml").write_text(RECIPE.format(steps=file.steps, more=file.more))
        began = time.process_time()
        code = main(["train", "recipe.yaml"])
        seconds = time.process_time() - began
        out, error = capsys.readouterr()
        place = f"recipe.yaml:{file.line}" if file.line else "recipe.yaml"
        fine = code == 2 and out == "" and error.startswith("error: ") and error.count("\n") == 1
        if not (fine and place in error and file.at in error and seconds < 1):
            wrong.append((file.name, code, f"{seconds:.2f} s", error))
    assert not wrong, wrong
    assert {path.name for path in workspace.iterdir()} == before, "no canary, no run folder"
    sys.stdout.write(f"S4: {len(FILES)} files, refused {len(FILES)}, executed 0\n")
