"""Real gloo ranks for tests: processes that stay up and run module-level functions on request.

Importing torch and Megatron costs seconds per process, so a pool per world size is shared by a whole test session
(fixtures `ranks2`, `ranks4` in tests/conftest.py). A function sent to a pool runs on every rank with an initialised
default process group; it must clean up what it initialises beyond that.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any


def _serve(rank: int, world_size: int, store: str, pipe: Connection) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=120)
    )
    while (job := pipe.recv()) is not None:
        function, args = job
        try:
            pipe.send(("ok", function(rank, *args)))
        except Exception:  # noqa: BLE001 - whatever a test function raises travels to the parent as text
            pipe.send(("error", traceback.format_exc()))
    dist.destroy_process_group()


class RankPool:
    """`world_size` gloo processes that run functions together."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._start()

    def _start(self) -> None:
        context = mp.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        store = os.path.join(self._folder.name, "store")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world_size, store, theirs), daemon=False)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 240.0) -> list[Any]:
        """Run ``function(rank, *args)`` on every rank; return the results by rank.

        The function and its arguments must be picklable (module-level). After an error or a timeout the ranks may be
        out of step, so the pool starts afresh.
        """
        for pipe in self._pipes:
            pipe.send((function, args))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(timeout if not any(a[0] == "error" for a in answers) else 5.0):
                answers.append(("error", f"rank {rank}: no answer within {timeout} s"))
            else:
                try:
                    answers.append(pipe.recv())
                except EOFError:
                    answers.append(("error", f"rank {rank}: process died"))
        errors = [f"rank {rank}:\n{text}" for rank, (status, text) in enumerate(answers) if status == "error"]
        if errors:
            self.close(kill=True)
            self._start()
            raise AssertionError("\n".join(errors))
        return [value for _, value in answers]

    def close(self, kill: bool = False) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            if kill:
                process.kill()
            else:
                pipe.send(None)
            process.join(20)
            if process.is_alive():
                process.kill()
            pipe.close()
        self._folder.cleanup()
