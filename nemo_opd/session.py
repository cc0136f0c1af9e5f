"""One attempt at a run in this process: join the others, lock the folder, resume, train, say how it ended."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

from nemo_opd.assemble import assemble, finish
from nemo_opd.config import Config, LimitsConfig
from nemo_opd.engines.megatron.parallel import init_distributed
from nemo_opd.loop import train
from nemo_opd.processes import Processes
from nemo_opd.reliability.budget import TimeBudget
from nemo_opd.reliability.heartbeat import Heartbeat, forget_beats
from nemo_opd.reliability.lock import RunLock, RunLocked
from nemo_opd.reliability.outcome import EXIT_CODES, Status, current_attempt, forget_outcome, write_outcome
from nemo_opd.reliability.stop import StopRequest, forget_old_request
from nemo_opd.reliability.watchdog import watching

_LEAST_COLLECTIVE_SECONDS, _MORE_SECONDS = 1800.0, 600.0


def run(config: Config) -> int:
    """Start or resume the run of `config` on this rank; returns the exit code. Every rank calls it.

    Errors are raised: `nemo_opd.worker` turns them into an outcome.
    """
    init_distributed(collective_timeout(config.limits))
    processes = Processes.current()
    folder = Path(config.run.dir)
    attempt = current_attempt()
    with ExitStack() as stack:
        take_folder(stack, folder, attempt, processes)
        budget = TimeBudget(folder, config.run.time_limit)
        if processes.is_first:
            budget.warn()
        stop = StopRequest(folder, attempt, processes, budget).listen()
        heartbeat = watched(stack, config, attempt, processes)
        with heartbeat.section("start"):
            parts = assemble(config, processes, stop, heartbeat)
        done = train(parts)
        finish(parts, done)
        status, reason = (Status.DONE, "") if done else (Status.PREEMPTED, stop.reason)
        if parts.diagnosed:
            status, reason = Status.DIAGNOSED, parts.diagnosed
        if processes.is_first:
            write_outcome(folder, status, parts.state.step, reason, attempt)
        processes.barrier()  # nobody ends before the outcome stands
    return EXIT_CODES[status]


def watched(stack: ExitStack, config: Config, attempt: str, processes: Processes) -> Heartbeat:
    """Beat until `stack` ends; the node's first rank has a watchdog beside it."""
    folder = Path(config.run.dir)
    start = f"{attempt}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    local = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", processes.size))
    heartbeat = Heartbeat(folder, processes.rank, start, synced=local[1] < processes.size).begin()
    stack.callback(heartbeat.end)
    if local[0] == 0:
        stack.enter_context(watching(folder, attempt, start, asdict(config.limits)))
    return heartbeat


def collective_timeout(limits: LimitsConfig) -> timedelta:
    """Longer than any section may take: ranks that wait for one that hangs must not be the first to say that something
    is wrong, for they would name themselves."""
    return timedelta(seconds=max([*filter(None, asdict(limits).values()), _LEAST_COLLECTIVE_SECONDS]) + _MORE_SECONDS)


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
            forget_beats(folder)
    if processes.any(refusal is not None):
        raise refusal or RunLocked("run.dir", f"{folder}, in use", "an unused run folder", "see what rank 0 says")
