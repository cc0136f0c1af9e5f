"""One attempt at a run in this process: join the others, lock the folder, resume, train, say how it ended."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from nemo_opd.assemble import assemble, finish
from nemo_opd.config import Config
from nemo_opd.engines.megatron.parallel import init_distributed
from nemo_opd.loop import train
from nemo_opd.processes import Processes
from nemo_opd.reliability.lock import RunLock, RunLocked
from nemo_opd.reliability.outcome import EXIT_CODES, Status, current_attempt, forget_outcome, write_outcome
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
        take_folder(stack, folder, attempt, processes)
        stop = StopRequest(folder, attempt, processes).listen()
        parts = assemble(config, processes, stop)
        done = train(parts)
        finish(parts, done)
        status, reason = (Status.DONE, "") if done else (Status.PREEMPTED, stop.reason)
        if parts.diagnosed:
            status, reason = Status.DIAGNOSED, parts.diagnosed
        if processes.is_first:
            write_outcome(folder, status, parts.state.step, reason, attempt)
        processes.barrier()  # nobody ends before the outcome stands
    return EXIT_CODES[status]


def take_folder(stack: ExitStack, folder: Path, attempt: str, processes: Processes) -> None:
    """Lock the run folder until `stack` ends, and clear away what earlier attempts said in it. Collective.

    Raises:
        RunLocked: another process uses the folder. On every rank, for none may then write into it.
    """
    refusal = None
    if processes.is_first:
        try:
            stack.enter_context(RunLock(folder))
        except RunLocked as error:
            refusal = error
        else:
            forget_old_request(folder, attempt)
            forget_outcome(folder)
    if processes.any(refusal is not None):
        raise refusal or RunLocked("run.dir", f"{folder}, in use", "an unused run folder", "see what rank 0 says")
