"""Ends what a cluster of the tests left when its tests were killed: python -m tests.slurm.reaper FOLDER

It waits until its standard input is closed, as happens when the process ends that started it, however it ends.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path


def processes(folder: Path, marks: Sequence[str] = ()) -> list[int]:
    """Processes of the cluster in `folder`, except this one; with `marks` those that have one of them in their
    environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # gone, or somebody else's
            continue
        ours = f"SLURM_CONF={folder / 'slurm.conf'}" in words
        if ours and int(path.name) != os.getpid() and (not marks or set(marks) & set(words)):
            found.append(int(path.name))
    return found


def reap(folder: Path) -> None:
    """Kill all of them, also those that are being started meanwhile, and remove the folder."""
    for _ in range(50):
        if not (found := processes(folder)):
            break
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.read()
    reap(Path(sys.argv[1]))
