"""Groups of ranks that can be killed and started again within a second: they are forked from a process that has
imported everything that a run needs.

Python's own fork server, with the preloading done by `nemo_opd`'s modules. What a rank forks itself (a checkpoint's
writers) is in its process group and dies with it.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

PRELOAD = ["tests.helpers.preloaded"]

Say = Callable[[Any], None]
"""How a rank tells its parent what it has come to."""


def context() -> ForkServerContext:
    """Of processes that are forked from the server; its first process waits for the imports."""
    found = mp.get_context("forkserver")
    found.set_forkserver_preload(PRELOAD)
    return found


def _main(function: Callable[..., None], rank: int, size: int, store: str, pipe: Connection, arguments: Any) -> None:
    os.setsid()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    import torch
    import torch.distributed as dist

    from nemo_opd.worker import tame_helpers

    torch.set_num_threads(1)
    tame_helpers()
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    function(rank, pipe.send, *arguments)
    pipe.send("end")


@dataclass
class Group:
    """`size` ranks that run ``function(rank, say, *arguments)``.

    Use it as a context: whatever is still there at the end is killed.
    """

    function: Callable[..., None]
    arguments: tuple[Any, ...]
    scratch: Path
    size: int = 2
    said: list[Any] = field(default_factory=list)
    """By rank 0, in order."""
    _processes: list[BaseProcess] = field(default_factory=list)

    def __enter__(self) -> Group:
        fork = context()
        store = self.scratch / f"store-{time.monotonic_ns()}"
        self._ours = []
        for rank in range(self.size):
            ours, theirs = fork.Pipe(duplex=False)
            arguments = (self.function, rank, self.size, str(store), theirs, self.arguments)
            process = fork.Process(target=_main, args=arguments)
            process.start()
            theirs.close()
            self._ours.append(ours)
            self._processes.append(process)
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for pipe in self._ours:
            pipe.close()

    def next(self, timeout: float = 120.0) -> Any:
        """What rank 0 says next; None when it has died."""
        if not self._ours[0].poll(timeout):
            raise AssertionError(f"rank 0 said nothing for {timeout} s after {self.said[-3:]}")
        try:
            self.said.append(self._ours[0].recv())
        except (EOFError, ConnectionResetError):
            return None
        return self.said[-1]

    def drain(self) -> None:
        """Take what rank 0 said before it died."""
        while self.next() is not None:
            pass

    def wait_for_a_death(self, timeout: float = 120.0) -> None:
        """Return when a rank has ended by itself."""
        assert wait([process.sentinel for process in self._processes], timeout), "every rank is alive"

    def kill(self) -> None:
        """SIGKILL to every rank and what it has forked, at once."""
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid or 0, signal.SIGKILL)
        for process in self._processes:
            process.join(20)
            assert process.exitcode is not None
