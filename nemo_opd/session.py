"""One attempt at a run on this process: lock, processes, resume, loop, export, outcome."""

from __future__ import annotations

import logging
import os
import secrets
import sys
import traceback
from pathlib import Path

from nemo_opd.config import Config
from nemo_opd.errors import ConfigError
from nemo_opd.processes import Processes
from nemo_opd.reliability.outcome import Status, write_outcome
from nemo_opd.reliability.stop import ATTEMPT_VARIABLE, StopRequest

log = logging.getLogger(__name__)

EXIT_DONE, EXIT_CONFIG, EXIT_FAILED, EXIT_PREEMPTED = 0, 2, 70, 75
"""For people; the launchers read outcome.json."""


def run(config: Config) -> int:
    """Start or resume the run of `config` on this rank and return the exit code. Every rank calls it.

    Raises nothing that a user caused: the reason goes to outcome.json, to the log and to stderr.
    """
    from nemo_opd.engines.megatron.parallel import init_distributed  # late: Megatron takes seconds to import

    init_distributed()
    processes = Processes.current()
    folder = Path(config.run.dir)
    attempt = os.environ.get(ATTEMPT_VARIABLE) or secrets.token_hex(8)
    step = 0
    try:
        stop = StopRequest(folder, attempt, processes).listen()
        from nemo_opd.assemble import assemble, finish
        from nemo_opd.loop import train

        parts = assemble(config, processes, stop)
        step = parts.state.step
        done = train(parts)
        step = parts.state.step
        if done:
            finish(parts)
        status, reason = (Status.DONE, f"all {step} steps") if done else (Status.PREEMPTED, stop.reason)
        code = EXIT_DONE if done else EXIT_PREEMPTED
    except ConfigError as error:
        status, reason, code = Status.CONFIG_ERROR, str(error), EXIT_CONFIG
        sys.stderr.write(f"error: {error}\n" if processes.is_first else "")
    except Exception as error:  # noqa: BLE001 - the last line of defence: whatever it was, the outcome must say so
        status, reason, code = Status.FAILED, f"rank {processes.rank}: {type(error).__name__}: {error}", EXIT_FAILED
        log.error("rank %d failed\n%s", processes.rank, traceback.format_exc())
    if processes.is_first or status is Status.FAILED:
        write_outcome(folder, status, step, reason, attempt)
    return code
