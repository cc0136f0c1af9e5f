"""How a run ended, as a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_opd.reliability.outcome import (
    ATTEMPT_VARIABLE,
    EXIT_CODES,
    Outcome,
    Status,
    current_attempt,
    new_attempt,
    read_outcome,
    write_failure,
    write_outcome,
)


@pytest.mark.parametrize("status", Status)
def test_what_was_written_is_read(tmp_path: Path, status: Status) -> None:
    written = write_outcome(tmp_path, status, 12, "why", "attempt-1")
    assert read_outcome(tmp_path) == written == Outcome(status, 12, "why", "attempt-1", 0)
    assert written.exit_code == EXIT_CODES[status]
    assert json.loads((tmp_path / "outcome.json").read_text())["status"] == status.value
    assert [path.name for path in tmp_path.iterdir()] == ["outcome.json"]


def test_exit_codes_differ() -> None:
    assert len(set(EXIT_CODES.values())) == len(Status)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"status": "fine"}', '{"status": "done", "extra": 1}'])
def test_an_unreadable_file_is_no_outcome(tmp_path: Path, text: str) -> None:
    assert read_outcome(tmp_path) is None
    (tmp_path / "outcome.json").write_text(text)
    assert read_outcome(tmp_path) is None


def test_the_first_error_of_an_attempt_stays(tmp_path: Path) -> None:
    write_outcome(tmp_path, "done", 5, "", "before")
    write_failure(tmp_path, Status.FAILED, "the cause", "now", rank=1)
    write_failure(tmp_path, Status.FAILED, "its consequence", "now", rank=0)
    assert read_outcome(tmp_path) == Outcome(Status.FAILED, None, "the cause", "now", 1)


def test_attempts_have_names() -> None:
    assert new_attempt() != new_attempt()
    assert current_attempt({ATTEMPT_VARIABLE: "a", "SLURM_JOB_ID": "7"}) == "a"
    assert current_attempt({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}) == "slurm-7-2"
    assert current_attempt({"TORCHELASTIC_RUN_ID": "x", "MASTER_PORT": "5"}) == "x-5"
