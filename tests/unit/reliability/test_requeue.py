"""What becomes of a job when an attempt has ended, from the files of the run folder alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_opd.reliability.outcome import Status, read_outcome, write_outcome
from nemo_opd.reliability.requeue import Starts, Verdict, begin, end, held, newest_step

STARTS = 3


def attempt(run_dir: Path, name: str, status: Status | None, step: int | None = None) -> Verdict:
    """One start that ends with that outcome, or without one."""
    assert begin(run_dir, name, STARTS) == ""
    if status is not None:
        write_outcome(run_dir, status, step, "a reason", name)
    return end(run_dir, name, STARTS)[0]


def checkpoint(run_dir: Path, step: int) -> None:
    (run_dir / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)


@pytest.mark.parametrize(
    ("status", "requeues"),
    [
        (Status.DONE, 0),
        (Status.PREEMPTED, 1),
        (Status.CONFIG_ERROR, 0),
        (Status.DIAGNOSED, 0),
        (Status.FAILED, 2),
        (None, 2),
    ],
)
def test_how_often_a_job_is_requeued(tmp_path: Path, status: Status | None, requeues: int) -> None:
    """A preempted one is done the second time; every other start ends as the first one did."""
    ends = [status, Status.DONE] if status is Status.PREEMPTED else [status] * 5
    made = 0
    for number, outcome in enumerate(ends):
        if attempt(tmp_path, f"a-{number}", outcome) is Verdict.STOP:
            break
        made += 1
    assert made == requeues


def test_a_failure_that_comes_back_is_given_up_with_the_reason(tmp_path: Path) -> None:
    checkpoint(tmp_path, 5)
    assert attempt(tmp_path, "a-0", Status.FAILED) is Verdict.REQUEUE
    assert attempt(tmp_path, "a-1", None) is Verdict.REQUEUE
    assert attempt(tmp_path, "a-2", Status.FAILED) is Verdict.STOP
    outcome = read_outcome(tmp_path)
    assert outcome is not None
    assert outcome.status is Status.FAILED
    assert outcome.reason == (
        "given up after 3 starts that came no further than checkpoint 5 (a-0, a-1, a-2): a reason"
    )
    refusal = begin(tmp_path, "b-0", STARTS)
    assert refusal == f"{outcome.reason}; when you have seen to it, remove {tmp_path / 'control' / 'held'}"

    (tmp_path / "control" / "held").unlink()
    assert attempt(tmp_path, "b-0", Status.FAILED) is Verdict.REQUEUE, "the count begins anew"


def test_a_newer_checkpoint_is_progress(tmp_path: Path) -> None:
    for step in range(1, 8):
        checkpoint(tmp_path, step)
        assert attempt(tmp_path, f"a-{step}", Status.FAILED) is Verdict.REQUEUE


def test_preemptions_between_failures_are_no_progress(tmp_path: Path) -> None:
    ends = [Status.FAILED, Status.PREEMPTED, Status.FAILED, Status.PREEMPTED]
    assert [attempt(tmp_path, f"a-{n}", status) for n, status in enumerate(ends)] == [Verdict.REQUEUE] * 4
    assert attempt(tmp_path, "a-4", Status.FAILED) is Verdict.STOP


def test_a_start_whose_end_nobody_saw_counts(tmp_path: Path) -> None:
    """The batch script's own node failed, and SLURM requeued the job by itself."""
    assert [begin(tmp_path, f"a-{n}", STARTS) for n in range(3)] == ["", "", ""]
    assert "given up after 3 starts that came no further than the beginning (a-0, a-1, a-2)" in begin(
        tmp_path, "a-3", STARTS
    )
    outcome = read_outcome(tmp_path)
    assert outcome is not None
    assert (outcome.status, outcome.attempt) == (Status.FAILED, "a-2")


@pytest.mark.parametrize("asked", [True, False])
def test_one_that_was_killed_when_it_had_been_asked_to_stop_does_not_count(tmp_path: Path, asked: bool) -> None:
    """SLURM kills a job whose save takes longer than it gives."""
    for number in range(4):
        refused = bool(begin(tmp_path, f"a-{number}", STARTS))
        assert refused == (number == 3 and not asked)
        if asked:
            (tmp_path / "control" / "stop").write_text(f"a-{number}\n")


def test_one_that_said_how_it_ended_before_its_script_was_killed(tmp_path: Path) -> None:
    begin(tmp_path, "a-0", STARTS)
    write_outcome(tmp_path, Status.PREEMPTED, 5, "signal SIGTERM", "a-0")
    assert begin(tmp_path, "a-1", STARTS) == ""
    assert Starts.read(tmp_path).failures == []


def test_an_outcome_of_an_earlier_attempt_is_none(tmp_path: Path) -> None:
    write_outcome(tmp_path, Status.DONE, 5, "", "before")
    verdict, outcome = end(tmp_path, "a-0", STARTS, "the servers ended")
    assert (verdict, outcome.status, outcome.reason) == (Verdict.REQUEUE, Status.FAILED, "the servers ended")


def test_the_diagnosis_holds_the_run(tmp_path: Path) -> None:
    assert attempt(tmp_path, "a-0", Status.DIAGNOSED, 7) is Verdict.STOP
    assert held(tmp_path).startswith("stopped by the diagnosis: a reason; when you have seen to it, remove ")
    assert begin(tmp_path, "a-1", STARTS) == held(tmp_path)


def test_a_damaged_count_begins_anew(tmp_path: Path) -> None:
    attempt(tmp_path, "a-0", Status.FAILED)
    (tmp_path / "control" / "starts.json").write_text('{"running": ')
    assert attempt(tmp_path, "a-1", Status.FAILED) is Verdict.REQUEUE
    assert len(Starts.read(tmp_path).failures) == 1


def test_unfinished_checkpoints_do_not_count(tmp_path: Path) -> None:
    assert newest_step(tmp_path) == -1
    for name in ("step-00000004", "tmp-00000009-1f3a", "trash-step-00000008-aa"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_step(tmp_path) == 4


def test_as_the_batch_script_calls_it(tmp_path: Path) -> None:
    def call(*words: str) -> tuple[int, str, str]:
        command = [sys.executable, "-m", "nemo_opd.reliability.requeue", str(tmp_path), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
        return done.returncode, done.stdout, done.stderr

    write_outcome(tmp_path, Status.PREEMPTED, 5, "control/stop asks for it", "a-0")
    assert call("a-0", "3") == (0, "requeue\n", "a-0: preempted at step 5: control/stop asks for it\n")
    write_outcome(tmp_path, Status.DONE, 9, "", "a-1")
    assert call("a-1", "3") == (0, "stop\n", "a-1: done at step 9\n")
    assert call("a-2", "1", "why it is")[:2] == (70, "stop\n")
