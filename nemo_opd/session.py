"""One attempt at a run in this process: join the others, lock the folder, resume, train, say how it ended."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from nemo_opd.assemble import assemble, finish
from nemo_opd.config import Config
from nemo_opd.engines.megatron.parallel import init_distributed
from nemo_opd.loop import train
from nemo_opd.processes import Processes
from nemo_opd.reliability.lock import RunLock
from nemo_opd.reliability.outcome import EXIT_CODES, Status, current_attempt, write_outcome
from nemo_opd.reliability.stop import StopRequest, forget_old_request


def run(config: Config) -> int:
    """Start or resume the run of `config` on this rank; returns the exit code. Every rank calls it.

    Errors are raised: `nemo_opd.worker` turns them into an outcome.
    """
    init_distributed()
    processes = Processes.current()
    folder = Path(config.run.dir)
    attempt = current_attempt()
    with ExitStack() as stack:
        if processes.is_first:
            stack.enter_context(RunLock(folder))
            forget_old_request(folder, attempt)
        processes.barrier()
        stop = StopRequest(folder, attempt, processes).listen()
        parts = assemble(config, processes, stop)
        done = train(parts)
        finish(parts, done)
        status, reason = (Status.DONE, "") if done else (Status.PREEMPTED, stop.reason)
        if processes.is_first:
            write_outcome(folder, status, parts.state.step, reason, attempt)
        processes.barrier()  # nobody ends before the outcome stands
    return EXIT_CODES[status]
