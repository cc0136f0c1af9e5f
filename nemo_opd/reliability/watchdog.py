"""A small process beside the ranks of one node, which ends them when the run hangs.

    python -m nemo_opd.reliability.watchdog RUN_DIR ATTEMPT START LIMITS

The node's first rank starts it. It needs nothing of the ranks but their heartbeat files and process ids, so a rank that
is stopped, or whose interpreter is locked, cannot keep it from its work. It ends with the last rank of its node.

On a hang (`suspects`) it writes `outcome.json`, then `heartbeat/hang.json`, for which the watchdogs of the other nodes
look, and kills every rank of its node with all that they started. Launchers see processes that failed, and end.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from nemo_opd.reliability.files import private_descriptor
from nemo_opd.reliability.heartbeat import ENDED, FOLDER, Beat, born, read_beat, stopped
from nemo_opd.reliability.outcome import Status, write_failure
from nemo_opd.reliability.suspects import Hang, Watched, find_hang

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.25
_STEP_SECONDS = 2.0
"""A longer pause between two looks is one in which this process did not run itself: it counts as this much."""
_SILENT_SECONDS = 3.0
_OTHER_NODES_SECONDS = 5.0
"""Between two looks at ranks of other nodes, for which the file system is asked ..."""
_PER_RANK_SECONDS = 0.03
"""... and more for each of them."""
_START_SECONDS = 120.0
"""In which a rank of this node must have begun to beat."""
HANG_FILE = "hang.json"


@contextmanager
def watching(run_dir: Path, attempt: str, start: str, limits: Mapping[str, float | None]) -> Iterator[int]:
    """A watchdog beside this process while the block runs; its process id."""
    command = [sys.executable, "-m", __name__, str(run_dir), attempt, start, json.dumps(dict(limits))]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


@dataclass
class _Seen:
    beat: Beat
    entered: float
    beaten: float


class Watchdog:
    """Looks at the ranks of one start of a run."""

    def __init__(self, run_dir: Path, attempt: str, start: str, limits: Mapping[str, float | None]) -> None:
        self._run_dir, self._attempt, self._start, self._limits = run_dir, attempt, start, limits
        self._folder, self._host = run_dir / FOLDER, socket.gethostname()
        self._seen: dict[Path, _Seen] = {}
        self._clock, self._looked = 0.0, time.monotonic()
        self._others_at = 0.0

    def watch(self) -> Hang | None:
        """Until a hang is found, here or on another node, or the node's ranks are gone (None)."""
        while True:
            self._pass_time()
            self._look()
            mine = [seen.beat for seen in self._seen.values() if self._is_here(seen.beat)]
            if not mine and (self._seen or self._clock > _START_SECONDS):
                return None
            hang = self._told() or self._find()
            if hang is not None:
                self._others_at = 0.0  # a rank may have begun since the folder was listed
                self._look()
                kill_trees([seen.beat.pid for seen in self._seen.values() if self._is_here(seen.beat)])
                return hang
            time.sleep(LOOK_SECONDS)

    def _pass_time(self) -> None:
        now = time.monotonic()
        self._clock += min(now - self._looked, _STEP_SECONDS)
        self._looked = now

    def _look(self) -> None:
        others = [path for path, seen in self._seen.items() if seen.beat.host != self._host]
        due = self._clock >= self._others_at
        if due:
            self._others_at = self._clock + _OTHER_NODES_SECONDS + _PER_RANK_SECONDS * len(others)
        paths = self._folder.glob("rank-*") if due or not self._seen else set(self._seen).difference(others)
        for path in paths:
            beat, seen = read_beat(path), self._seen.get(path)
            if beat is None or beat.start != self._start:
                continue
            if seen is None:
                ago = min(max(time.time() - beat.since, 0.0), _START_SECONDS)  # it began before this process looked
                self._seen[path] = _Seen(beat, self._clock - ago, self._clock)
                continue
            if beat.entry != seen.beat.entry:
                seen.entered = self._clock
            if (beat.count, beat.entry) != (seen.beat.count, seen.beat.entry):
                seen.beaten = self._clock
            seen.beat = beat

    def _is_here(self, beat: Beat) -> bool:
        return beat.host == self._host and beat.section != ENDED and born(beat.pid) == beat.born

    def _is_stopped(self, beat: Beat) -> bool:
        return beat.host == self._host and stopped(beat.pid)

    def _find(self) -> Hang | None:
        """Judge all ranks, and say so before anybody is killed, who would tell what that did to him."""
        ranks = [
            Watched(seen.beat, self._clock - seen.entered, self._clock - seen.beaten, self._is_stopped(seen.beat))
            for seen in self._seen.values()
            if seen.beat.section != ENDED and (seen.beat.host != self._host or self._is_here(seen.beat))
        ]
        far = sum(rank.beat.host != self._host for rank in ranks)
        silent = 3 * (_OTHER_NODES_SECONDS + _PER_RANK_SECONDS * far) if far else _SILENT_SECONDS
        hang = find_hang(ranks, self._limits, silent)
        if hang is not None:
            log.error("%s", hang)
            write_failure(self._run_dir, Status.FAILED, str(hang), self._attempt, hang.rank)
            self._tell(hang)
        return hang

    def _tell(self, hang: Hang) -> None:
        path = self._folder / HANG_FILE
        text = json.dumps({"start": self._start, **asdict(hang)}) + "\n"
        try:
            descriptor = private_descriptor(path, os.O_WRONLY | os.O_EXCL)
        except FileExistsError:  # another node's watchdog was first
            return
        with os.fdopen(descriptor, "w") as file:
            file.write(text)

    def _told(self) -> Hang | None:
        """What another node's watchdog found."""
        with suppress(OSError, ValueError, TypeError):
            fields = json.loads((self._folder / HANG_FILE).read_text())
            if fields.pop("start") == self._start:
                return Hang(**fields)
        return None


def kill_trees(pids: Sequence[int]) -> None:
    """SIGKILL to these processes and all below them, but not to this one. A stopped process dies as well."""
    family = list(pids)
    for pid in family:  # grows while it is walked
        family.extend(child for child in _children(pid) if child != os.getpid() and child not in family)
    for pid in family:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def _children(pid: int) -> list[int]:
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += [int(child) for child in path.read_text().split()]
    return found


def main() -> int:
    run_dir, attempt, start, limits = sys.argv[1:]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a request to stop is for the ranks, with whose last one this ends
    logging.basicConfig(level=logging.INFO, format="watchdog: %(message)s")
    return 0 if Watchdog(Path(run_dir), attempt, start, json.loads(limits)).watch() is None else 1


if __name__ == "__main__":
    sys.exit(main())
