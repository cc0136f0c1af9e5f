"""A stop request reaches every rank at the same point, and only the attempt that it means."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from nemo_opd.processes import Processes
from nemo_opd.reliability.stop import StopRequest, forget_old_request
from tests.helpers.ranks import RankPool


def _write(run_dir: Path, content: str) -> None:
    (run_dir / "control").mkdir(exist_ok=True)
    (run_dir / "control" / "stop").write_text(content)


def test_the_file_stops_the_attempt_that_it_names(tmp_path):
    stop = StopRequest(tmp_path, "attempt-2", Processes())
    assert not stop.agreed()
    _write(tmp_path, "attempt-1\n")
    assert not stop.agreed()
    _write(tmp_path, "attempt-2\n")
    assert stop.agreed()
    assert "control/stop" in stop.reason


def test_any_attempt_can_be_meant(tmp_path):
    _write(tmp_path, "any")
    assert StopRequest(tmp_path, "whichever", Processes()).agreed()


def _one_rank_asks(rank: int, folder: str) -> list[bool]:
    processes = Processes.current()
    stop = StopRequest(Path(folder), "a", processes)
    before = stop.agreed()
    if rank == 1:
        stop._on_signal(signal.SIGTERM, None)
    return [before, stop.agreed(), stop.requested()]


def test_one_rank_is_enough(ranks2: RankPool, tmp_path):
    assert ranks2.run(_one_rank_asks, str(tmp_path)) == [[False, True, True]] * 2


class _SignalledWhileWaiting(Processes):
    """This process's signal arrives while it waits in the collective, after it said that nobody had asked it."""

    def any(self, flag: bool) -> bool:
        os.kill(os.getpid(), signal.SIGUSR1)
        return super().any(flag)


def test_a_request_during_the_vote_waits_for_the_next_one(tmp_path):
    """The other ranks were told "no": a rank that then answered "yes" would leave the loop alone."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    stop = StopRequest(tmp_path, "a", _SignalledWhileWaiting()).listen()
    try:
        assert not stop.agreed()
        assert stop.requested()
        assert stop.agreed()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_without_a_run_folder_no_file_is_obeyed(tmp_path, monkeypatch):
    _write(tmp_path, "any")
    monkeypatch.chdir(tmp_path)
    assert not StopRequest(None, "evaluation", Processes()).agreed()


_CHILD = """
import sys, time
from pathlib import Path
from nemo_opd.processes import Processes
from nemo_opd.reliability.stop import StopRequest, forget_old_request
stop = StopRequest(Path(sys.argv[1]), "a", Processes()).listen()
sys.stdout.write("ready\\n"); sys.stdout.flush()
while not stop.requested():
    time.sleep(0.01)
sys.stdout.write(stop.reason + "\\n"); sys.stdout.flush()
time.sleep(30)
"""


def test_a_signal_asks_and_a_second_interrupt_ends(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "signal SIGINT\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode != 0
    assert "stopping, with a checkpoint" in errors
    assert "KeyboardInterrupt" in errors


def test_a_new_attempt_forgets_old_requests_but_not_its_own(tmp_path):
    for content, remains in (("any", False), ("attempt-1", False), ("attempt-2", True)):
        _write(tmp_path, content)
        forget_old_request(tmp_path, "attempt-2")
        assert StopRequest(tmp_path, "attempt-2", Processes()).agreed() is remains
    forget_old_request(tmp_path, "attempt-3")
    forget_old_request(tmp_path, "attempt-3")
