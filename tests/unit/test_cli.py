"""The command line as a user meets it: help, one-line errors, exit codes, nothing heavy imported before a check."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_opd.cli import main
from nemo_opd.reliability.lock import RunLock
from tests.unit.configuration.workspace import make_workspace

HEAVY = {"torch", "numpy", "transformers", "megatron", "nemo", "datasets", "pyarrow"}


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"):
        monkeypatch.delenv(name, raising=False)
    make_workspace(tmp_path)
    return tmp_path


def imported(*words: str) -> tuple[int, str, set[str]]:
    """Run `nemo-opd WORDS` in a fresh process; returns exit code, stderr and the top-level packages it imported."""
    command = [sys.executable, "-X", "importtime", "-m", "nemo_opd.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    trace = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    errors = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    return done.returncode, "\n".join(errors), {line.rpartition("|")[2].strip().partition(".")[0] for line in trace}


@pytest.mark.parametrize(
    "words", [["--help"], *([verb, "--help"] for verb in ("train", "doctor", "eval", "signal", "export", "import"))]
)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code, errors, packages = imported(*words)
    assert (code, errors) == (0, "")
    assert "nemo_opd" in packages
    assert packages & HEAVY == set()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["student.tensor_model_parallel_size=3"],
            "error: student.tensor_model_parallel_size: got 3; expected 1, 2 or 4 (",
        ),
        (["train.lr=1"], "error: train.lr: got an unknown key; expected a key of `train`; did you mean"),
        (["teacher.model=nowhere"], "error: teacher.model: got no folder nowhere; expected a model folder; give a"),
    ],
)
def test_an_error_comes_before_anything_heavy_is_imported(workspace: Path, words: list[str], message: str) -> None:
    code, errors, packages = imported("train", "recipe.yaml", *words)
    assert code == 2
    assert errors.startswith(message)
    assert "\n" not in errors
    assert packages & HEAVY == set()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "error: command line: the following arguments are required: VERB; see `nemo-opd --help`\n"),
        (["trian"], "error: command line: argument VERB: invalid choice: 'trian' (choose from"),
        (["train"], "error: command line: the following arguments are required: RECIPE; see `nemo-opd train"),
        (["train", "r.yaml", "--steps", "5"], "error: command line: unknown argument --steps; see `nemo-opd --help`\n"),
        (["export", "runs/x"], "error: command line: the following arguments are required: DIR; see `nemo-"),
    ],
)
def test_mistakes_in_the_words_themselves(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith(message), errors
    assert errors.count("\n") == 1


def test_help_of_every_verb_has_examples_and_the_main_help_has_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("train", "eval", "export", "data"):
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        assert f"nemo-opd {verb} " in capsys.readouterr().out.partition("examples:")[2]
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n  {code} " in text for code in (0, 2, 70, 75, 130))


@pytest.mark.parametrize(
    "words", [["--check", "recipe.yaml", "train.steps=7"], ["recipe.yaml", "train.steps=7", "--check"],
              ["recipe.yaml", "--check", "train.steps=7"]]
)  # fmt: skip
def test_options_may_stand_anywhere(workspace: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *words]) == 0
    assert "\n  steps: 7\n" in capsys.readouterr().out
    assert not (workspace / "run").exists(), "--check starts nothing"


def test_a_run_folder_in_use_is_refused(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("start", "run"):
        with RunLock(workspace / "run", name):
            assert main(["train", "recipe.yaml"]) == 2
        errors = capsys.readouterr().err
        assert errors.startswith(f"error: run.dir: got run, in use by process {os.getpid()} on ")
        assert "; expected a run folder that no other process uses; wait for that run, stop it" in errors


def test_below_a_launcher_only_the_first_process_speaks(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert main(["train", "recipe.yaml", "train.lr=1"]) == 2
        assert capsys.readouterr().err.count("\n") == lines


def test_settings_of_eval_are_refused_before_anything_heavy_is_imported(workspace: Path) -> None:
    code, errors, packages = imported("eval", "student", "--data", "train.jsonl", "evaluate.problem=5")
    assert code == 2
    assert errors == (
        "error: evaluate.problem: got an unknown key; expected a key of `evaluate`; did you mean `evaluate.problems`?"
    )
    assert packages & HEAVY == set()


def test_eval_and_export_refuse_a_folder_that_is_none_of_ours(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "student", "out"]) == 2
    assert "student: got a model folder; expected a checkpoint folder with state.json" in capsys.readouterr().err
    assert main(["eval", "gone"]) == 2
    assert "gone: got no such folder; expected a checkpoint folder" in capsys.readouterr().err
    assert main(["eval", "student", "--data", "gone.jsonl"]) == 2
    assert "--data: got no file gone.jsonl; expected a .jsonl or .parquet file" in capsys.readouterr().err
    (workspace / "finished" / "checkpoints").mkdir(parents=True)
    (workspace / "finished" / "config.yaml").write_text("algorithm: opd\n")
    assert main(["eval", "finished", "--data", "train.jsonl", "--compare-transformers"]) == 2
    assert "--compare-transformers: got a run folder; expected a model folder" in capsys.readouterr().err
    assert main(["export", "finished", "student"]) == 2
    assert "DIR: got student, which is not empty; expected a new or empty folder" in capsys.readouterr().err
