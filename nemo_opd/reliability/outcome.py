"""How a run ended, as a file: `outcome.json` in the run folder, written atomically: by the process that holds
its lock, or, when a process fails, by the first one that does.

The file is what others rely on; exit codes are for people, and they are fixed here, once:

    0    done
    2    config_error: a setting that cannot work, found at the command line or later
    65   diagnosed: stopped by a sign of failure (docs/diagnosis.md), with a checkpoint; the same command would end the
         same way after a step, so nobody should start it again before a person has looked at it
    70   failed
    75   preempted: stopped on request, with a checkpoint; the same command goes on from there
    130  interrupted at once (second Ctrl-C); the newest checkpoint is the one before

Under a launcher (torchrun, srun) `preempted` and `diagnosed` exit with 0: any other code would make the launcher kill
the processes that are still saving, and print a failure that is none.
"""

from __future__ import annotations

import enum
import json
import logging
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from nemo_opd.reliability.files import replace_private
from nemo_opd.reliability.redact import redact

log = logging.getLogger(__name__)

ATTEMPT_VARIABLE = "NEMO_OPD_ATTEMPT"
"""Environment variable that names one start of a run; whoever starts the processes sets it for all of them."""
OUTCOME_FILE = "outcome.json"
INTERRUPTED = 130


class Status(enum.StrEnum):
    """How a run ended."""

    DONE = "done"
    PREEMPTED = "preempted"
    CONFIG_ERROR = "config_error"
    FAILED = "failed"
    DIAGNOSED = "diagnosed"


EXIT_CODES: dict[Status, int] = {
    Status.DONE: 0,
    Status.CONFIG_ERROR: 2,
    Status.DIAGNOSED: 65,
    Status.FAILED: 70,
    Status.PREEMPTED: 75,
}
SAVED = (Status.PREEMPTED, Status.DIAGNOSED)
"""Ended by decision of all processes together, with a checkpoint."""


@dataclass(frozen=True)
class Outcome:
    """Example: ``Outcome("preempted", step=120, reason="signal SIGTERM", attempt="1f3a9c", rank=0)``."""

    status: Status
    step: int | None
    """Optimizer steps done; None where the process did not get that far."""
    reason: str
    """Empty when done, else why the run ended, in one line."""
    attempt: str
    rank: int = 0
    """The process that says so."""

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.status]


def new_attempt() -> str:
    """A name for one start of a run: ``20261120T101500-1f3a9c``."""
    return f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"


def current_attempt(environment: Mapping[str, str] = os.environ) -> str:
    """The name of this start, the same in all its processes.

    Set by our launcher and by slurm/opd.sh; below another launcher it is that launcher's own name for the start.
    """
    if name := environment.get(ATTEMPT_VARIABLE):
        return name
    if job := environment.get("SLURM_JOB_ID"):
        return f"slurm-{job}-{environment.get('SLURM_RESTART_COUNT', '0')}"
    return f"{environment.get('TORCHELASTIC_RUN_ID', 'launched')}-{environment.get('MASTER_PORT', '0')}"


def write_outcome(
    run_dir: Path, status: Status | str, step: int | None, reason: str, attempt: str, rank: int = 0
) -> Outcome:
    """Replace `outcome.json`; a reader sees the old file or the new one, never a part."""
    outcome = Outcome(Status(status), step, redact(reason), attempt, rank)
    replace_private(run_dir / OUTCOME_FILE, json.dumps(asdict(outcome), indent=1) + "\n")
    return outcome


def write_failure(run_dir: Path, status: Status, reason: str, attempt: str, rank: int) -> Outcome:
    """Write that this attempt failed, unless a process said so before: the first error is the cause, others follow."""
    earlier = read_outcome(run_dir)
    if earlier is not None and earlier.attempt == attempt:
        return earlier
    return write_outcome(run_dir, status, None, reason, attempt, rank)


def forget_outcome(run_dir: Path) -> None:
    """Remove what an earlier attempt left: a run that goes on has no outcome, nor has one that was killed."""
    (run_dir / OUTCOME_FILE).unlink(missing_ok=True)


def read_outcome(run_dir: Path) -> Outcome | None:
    """What `outcome.json` says; None without a readable one."""
    try:
        fields = json.loads((run_dir / OUTCOME_FILE).read_text(encoding="utf-8"))
        return Outcome(**{**fields, "status": Status(fields["status"])})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        log.warning("%s is not readable: %s", run_dir / OUTCOME_FILE, error)
        return None
