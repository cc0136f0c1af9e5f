"""One run folder, one run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_opd.reliability.lock import RunLock, RunLocked, probe

HOLDER = """
import sys, time
from pathlib import Path
from nemo_opd.reliability.lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_refused_and_told_who_has_it(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    for attempt in (lambda: RunLock(tmp_path).__enter__(), lambda: probe(tmp_path)):
        with pytest.raises(RunLocked, match=f"run.dir: got {tmp_path}, in use by process {holder.pid} on "):
            attempt()


def test_a_killed_process_leaves_no_lock(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    probe(tmp_path)
    with RunLock(tmp_path):
        pass


def test_the_two_locks_of_a_folder_are_independent(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with RunLock(tmp_path, "start"):
        with pytest.raises(RunLocked, match=f"process {os.getpid()} "):
            probe(tmp_path, "start")
        with pytest.raises(RunLocked, match=f"process {holder.pid} "):
            probe(tmp_path, "run")
    probe(tmp_path, "start")


def test_a_lock_can_be_taken_again_and_a_probe_leaves_nothing(tmp_path: Path) -> None:
    probe(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    for _ in range(2):
        with RunLock(tmp_path / "new"):
            pass
        probe(tmp_path / "new")


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("untouched")
    (tmp_path / ".lock").symlink_to(target)
    with pytest.raises(OSError, match="symbolic link"):
        RunLock(tmp_path).__enter__()
    assert target.read_text() == "untouched"
