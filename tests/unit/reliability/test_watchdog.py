"""The watchdog beside small processes that hang in different ways; whole runs: tests/reliability/test_hangs.py."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from nemo_opd.errors import ConfigError
from nemo_opd.reliability import watchdog
from nemo_opd.reliability.heartbeat import ENDED, Heartbeat, beat_file, born, forget_beats, read_beat, where
from nemo_opd.reliability.outcome import Status, read_outcome
from nemo_opd.reliability.suspects import Hang
from nemo_opd.reliability.watchdog import HANG_FILE

LIMIT = 4.0
"""Of the section that hangs: more than the time after which a beat that stands still counts."""
SLACK = 1.0 + 0.25
"""Seconds beyond the limit in which a hang is named, one look of the watchdog included."""
DEADLINE = 60.0

RANK = """
import ctypes, os, subprocess, sys, time
from contextlib import ExitStack
from pathlib import Path
from nemo_opd.reliability.heartbeat import Heartbeat
from nemo_opd.reliability.watchdog import watching
folder, rank, mode, limit = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], float(sys.argv[4])
wait = {}
exec(compile("def wait():\\n import time\\n time.sleep(600)", "/x/torch/distributed/waits.py", "exec"), wait)
with ExitStack() as stack:
    heartbeat = Heartbeat(folder, rank, "a/0").begin()
    stack.callback(heartbeat.end)
    if rank == 0:
        stack.enter_context(watching(folder, "a", "a/0", {"score": limit, "rollout": 600.0, "between": 600.0}))
    with heartbeat.section("rollout"):
        child = subprocess.Popen(["sleep", "600"])
        (folder / f"child-{rank}").write_text(str(child.pid))
        time.sleep(0.3)
    with heartbeat.section("score"):
        (folder / f"in-{rank}").write_text(str(time.time()))
        if mode == "lock":
            ctypes.PyDLL(None).sleep(600)
        elif mode == "sleep":
            time.sleep(600)
        elif mode == "wait":
            wait["wait"]()
        elif mode == "pass":
            child.kill()
"""


class Ranks:
    """Two processes with a heartbeat; the first has a watchdog beside it."""

    def __init__(self, folder: Path, *modes: str) -> None:
        self.folder = folder
        self.processes = [
            subprocess.Popen([sys.executable, "-c", RANK, str(folder), str(rank), mode, str(LIMIT)])
            for rank, mode in enumerate(modes)
        ]
        until(lambda: all((folder / f"in-{rank}").exists() for rank in range(len(modes))))

    def end(self) -> float:
        """When the last one was gone."""
        for process in self.processes:
            process.wait(timeout=DEADLINE)
        return time.time()

    def hung_since(self) -> float:
        return max(float((self.folder / f"in-{rank}").read_text()) for rank in range(len(self.processes)))

    def left(self) -> list[int]:
        """Processes that are still there: children of the ranks, watchdogs."""
        children = [int(path.read_text()) for path in self.folder.glob("child-*")]
        watchdogs = [p.pid for p in psutil.process_iter() if str(self.folder) in _arguments(p)]
        return [pid for pid in [*children, *watchdogs] if born(pid) is not None]


def _arguments(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def until(condition) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[list[Ranks]]:
    """To put what was started into: a test that fails leaves nothing."""
    started: list[Ranks] = []
    yield started
    for group in started:
        for process in group.processes:
            process.kill()
        until(lambda group=group: not [pid for pid in group.left() if _kill(pid)])


def _kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("stop", "it is stopped by a signal"),
        ("lock", "a call holds the interpreter's lock"),
        ("sleep", "it runs, and waits for no other rank"),
    ],
)
@pytest.mark.parametrize("culprit", [0, 1])
def test_the_rank_that_hangs_is_named_and_nobody_is_left(
    tmp_path: Path, ranks: list[Ranks], mode: str, words: str, culprit: int
) -> None:
    modes = ["wait", "wait"]
    modes[culprit] = "wait" if mode == "stop" else mode
    ranks.append(group := Ranks(tmp_path, *modes))
    if mode == "stop":
        group.processes[culprit].send_signal(signal.SIGSTOP)
    late = group.end() - group.hung_since() - LIMIT
    assert [process.returncode for process in group.processes] == [-signal.SIGKILL] * 2
    outcome = read_outcome(tmp_path)
    assert outcome is not None and (outcome.status, outcome.rank, outcome.attempt) == (Status.FAILED, culprit, "a")
    assert (
        f"rank {culprit} on " in outcome.reason and f"in section score, limits.score is {LIMIT:g} s" in outcome.reason
    )
    assert words in outcome.reason
    age = re.search(r"hangs: ([\d.]+) s", outcome.reason)
    assert age is not None and LIMIT <= float(age[1]) <= LIMIT + SLACK
    assert -0.5 < late < SLACK + 1.0, "named, then ended"
    until(lambda: not group.left())


def test_ranks_that_come_to_their_end_are_left_alone_and_the_watchdog_goes_with_them(
    tmp_path: Path, ranks: list[Ranks]
) -> None:
    ranks.append(group := Ranks(tmp_path, "pass", "pass"))
    group.end()
    assert [process.returncode for process in group.processes] == [0, 0]
    assert read_outcome(tmp_path) is None
    until(lambda: not group.left())
    beats = [read_beat(beat_file(tmp_path, rank)) for rank in (0, 1)]
    assert [beat.section for beat in beats if beat] == [ENDED, ENDED]


def test_what_another_node_s_watchdog_found_ends_this_node_too(tmp_path: Path, ranks: list[Ranks]) -> None:
    ranks.append(group := Ranks(tmp_path, "wait", "wait"))
    found = {"start": "a/0", "rank": 7, "host": "n9", "section": "score", "age": 9.0, "limit": 8.0, "how": "x"}
    (tmp_path / "heartbeat" / HANG_FILE).write_text(json.dumps(found | {"start": "yesterday/0"}))
    time.sleep(1.0)
    assert all(process.poll() is None for process in group.processes)
    (tmp_path / "heartbeat" / HANG_FILE).write_text(json.dumps(found))
    group.end()
    assert [process.returncode for process in group.processes] == [-signal.SIGKILL] * 2
    assert read_outcome(tmp_path) is None, "whoever found it has said so"


def test_a_rank_that_began_after_the_last_look_is_ended_with_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is not listed at every look, for it may be on a slow file system."""
    ended: list[int] = []
    hang = Hang(0, "n1", "score", 9.0, 8.0, "x")
    monkeypatch.setattr(watchdog, "kill_trees", ended.extend)
    dog = watchdog.Watchdog(tmp_path, "a", "a/0", {})
    beats = [Heartbeat(tmp_path, 0, "a/0").begin()]
    monkeypatch.setattr(dog, "_find", lambda: beats.append(Heartbeat(tmp_path, 1, "a/0").begin()) or hang)
    try:
        assert dog.watch() == hang
    finally:
        for heartbeat in beats:
            heartbeat.end()
    assert ended == [os.getpid()] * 2


def test_a_watchdog_that_was_stopped_itself_blames_nobody_for_that_time(tmp_path: Path, ranks: list[Ranks]) -> None:
    """A job that the scheduler suspended, a debugger: everybody stood still."""
    ranks.append(group := Ranks(tmp_path, "wait", "wait"))
    family = [psutil.Process(process.pid) for process in group.processes]
    family += family[0].children()
    for process in family:
        process.suspend()
    time.sleep(LIMIT + 2)
    for process in family:
        process.resume()
    time.sleep(0.7)
    assert all(process.poll() is None for process in group.processes)


def test_the_files_are_for_their_user_alone_and_no_link_is_followed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("mine")
    (tmp_path / "run" / "heartbeat").mkdir(parents=True)
    beat_file(tmp_path / "run", 0).symlink_to(target)
    with pytest.raises(ConfigError, match="got a link"):
        Heartbeat(tmp_path / "run", 0, "a/0").begin()
    assert target.read_text() == "mine"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "heartbeat").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="got a link"):
        Heartbeat(tmp_path / "other", 0, "a/0").begin()
    heartbeat = Heartbeat(tmp_path / "third", 0, "a/0").begin()
    heartbeat.end()
    assert stat.S_IMODE(beat_file(tmp_path / "third", 0).stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "third" / "heartbeat").stat().st_mode) == 0o700
    forget_beats(tmp_path / "third")
    assert read_beat(beat_file(tmp_path / "third", 0)) is None


def test_a_beat_says_where_and_since_when(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path, 3, "a/0").begin()
    path = beat_file(tmp_path, 3)
    try:
        with heartbeat.section("save"), heartbeat.section("load"):
            inner = read_beat(path)
            assert inner is not None and (inner.rank, inner.section, inner.entry) == (3, "load", 2)
            assert inner.pid == os.getpid() and inner.born == born(os.getpid()) and time.time() - inner.since < 5
            until(lambda: (beat := read_beat(path)) is not None and beat.count >= inner.count + 2)
        after = read_beat(path)
        assert after is not None and (after.section, after.entry) == ("between", 4)
    finally:
        heartbeat.end()
    assert where(sys._getframe()) == "", "a test is none of our own code"
