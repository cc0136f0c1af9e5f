"""What happens around a run: who may use the folder, and what of earlier attempts is left in it."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest

from nemo_opd import session
from nemo_opd.config import Config, DataConfig, RunConfig
from nemo_opd.processes import Processes
from nemo_opd.reliability.lock import RunLock, RunLocked, probe
from nemo_opd.reliability.outcome import EXIT_CODES, Status, read_outcome, write_failure, write_outcome
from nemo_opd.session import take_folder
from tests.helpers.ranks import RankPool


def _refused(rank: int, folder: str) -> bool:
    try:
        with ExitStack() as stack:
            take_folder(stack, Path(folder), "second", Processes.current())
    except RunLocked:
        return True
    return False


def test_a_used_folder_is_refused_on_every_rank(ranks2: RankPool, tmp_path: Path) -> None:
    with RunLock(tmp_path):
        write_outcome(tmp_path, Status.DONE, 5, "", "first")
        assert ranks2.run(_refused, str(tmp_path)) == [True, True]
        outcome = read_outcome(tmp_path)
        assert outcome is not None and outcome.attempt == "first", "the folder is another run's"
    assert ranks2.run(_refused, str(tmp_path)) == [False, False]


def test_a_failure_is_written_where_a_launcher_gives_every_start_the_same_name(tmp_path: Path) -> None:
    """Plain torchrun does: its run id is `none` and its port is fixed."""
    write_outcome(tmp_path, Status.DONE, 5, "", "none-29500")
    with ExitStack() as stack:
        take_folder(stack, tmp_path, "none-29500", Processes())
        assert read_outcome(tmp_path) is None
        with pytest.raises(RunLocked):
            probe(tmp_path)
        write_failure(tmp_path, Status.FAILED, "out of memory", "none-29500", rank=0)
    outcome = read_outcome(tmp_path)
    assert outcome is not None and (outcome.status, outcome.reason) == (Status.FAILED, "out of memory")


@pytest.mark.parametrize(
    ("done", "diagnosed", "status"),
    [(True, "", Status.DONE), (False, "", Status.PREEMPTED), (False, "repetition since step 7", Status.DIAGNOSED)],
)
def test_the_outcome_says_how_the_run_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: bool, diagnosed: str, status: Status
) -> None:
    parts = SimpleNamespace(state=SimpleNamespace(step=7), diagnosed=diagnosed)
    monkeypatch.setattr(session, "init_distributed", lambda *_: None)
    monkeypatch.setattr(session, "assemble", lambda *_: parts)
    monkeypatch.setattr(session, "train", lambda _: done)
    monkeypatch.setattr(session, "finish", lambda *_: None)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        code = session.run(Config(run=RunConfig(dir=str(tmp_path)), data=DataConfig(path="unused")))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    outcome = read_outcome(tmp_path)
    assert outcome is not None
    assert (outcome.status, outcome.step, outcome.reason) == (status, 7, diagnosed)
    assert code == outcome.exit_code == EXIT_CODES[status]
