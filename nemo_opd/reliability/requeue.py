"""Whether a run on a cluster is started again: from `outcome.json` alone, and from how often it failed at one place.

    done          no
    preempted     yes: it was asked to stop, and goes on from its checkpoint
    config_error  no: the same command would be refused again
    diagnosed     no: a person should look first (held)
    failed        yes, until so many starts ended without a newer checkpoint; then no (held)
    no outcome    as failed: its processes were killed, or their node was

A held run has a file `control/held` with the reason. Nothing starts it on the cluster while that file is there, also
not another job of the same run that was already waiting. Who has seen to the reason removes the file.

    python -m nemo_opd.reliability.requeue RUN_DIR ATTEMPT STARTS [WHY]      prints `requeue` or `stop`, and says why
"""

from __future__ import annotations

import enum
import json
import re
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nemo_opd.reliability.files import private_folder, replace_private
from nemo_opd.reliability.outcome import EXIT_CODES, Outcome, Status, read_outcome, write_outcome

_VANISHED = "its processes ended without an outcome: they were killed, or their node failed; see the logs"
_STEP = re.compile(r"step-(\d+)")


class Verdict(enum.StrEnum):
    """What happens to the job at the end of an attempt."""

    REQUEUE = "requeue"
    STOP = "stop"


@dataclass
class Starts:
    """The attempts of a run that came to nothing: `control/starts.json`."""

    running: str = ""
    """The attempt that began last, until its end has been seen."""
    failures: list[tuple[str, int]] = field(default_factory=list)
    """Attempts that failed, each with the step of the newest checkpoint when it ended; -1 without one."""

    @classmethod
    def read(cls, run_dir: Path) -> Starts:
        try:
            fields = json.loads(_file(run_dir).read_text(encoding="utf-8"))
            return cls(str(fields["running"]), [(str(name), int(step)) for name, step in fields["failures"]])
        except (OSError, ValueError, TypeError, KeyError):  # none, or a damaged one: count from here
            return cls()

    def write(self, run_dir: Path) -> None:
        _write(_file(run_dir), json.dumps(asdict(self), indent=1) + "\n")

    def failed_at(self, step: int) -> list[str]:
        """The attempts since the last progress."""
        return [attempt for attempt, at in self.failures if at == step]


def begin(run_dir: Path, attempt: str, starts: int) -> str:
    """Note that an attempt begins; returns why it must not, or nothing.

    An attempt before it whose end nobody saw, as the node of the batch script failed, counts as failed now, unless it
    was asked to stop: then it was killed on purpose.
    """
    if reason := held(run_dir):
        return reason
    known = Starts.read(run_dir)
    outcome = read_outcome(run_dir)
    if (before := known.running) and not _ended_well(run_dir, before, outcome):
        last = outcome if outcome is not None and outcome.attempt == before else None
        reason = last.reason if last else _VANISHED
        if gave_up := _count(run_dir, known, before, starts, reason):
            write_outcome(run_dir, Status.FAILED, last.step if last else None, gave_up, before)
            return held(run_dir)
    known.running = attempt
    known.write(run_dir)
    return ""


def end(run_dir: Path, attempt: str, starts: int, why: str = "") -> tuple[Verdict, Outcome]:
    """What is to be done now that all processes of an attempt have ended.

    Args:
        starts: so many may end without a newer checkpoint.
        why: what the caller knows about an attempt that left no outcome.
    """
    outcome = read_outcome(run_dir)
    if outcome is None or outcome.attempt != attempt:
        outcome = write_outcome(run_dir, Status.FAILED, None, why or _VANISHED, attempt)
    known = Starts.read(run_dir)
    verdict = Verdict.REQUEUE if outcome.status in (Status.PREEMPTED, Status.FAILED) else Verdict.STOP
    if outcome.status is Status.DIAGNOSED:
        hold(run_dir, f"stopped by the diagnosis: {outcome.reason}")
    if outcome.status is Status.FAILED and (gave_up := _count(run_dir, known, attempt, starts, outcome.reason)):
        verdict = Verdict.STOP
        outcome = write_outcome(run_dir, Status.FAILED, outcome.step, gave_up, attempt, outcome.rank)
    known.running = ""
    known.write(run_dir)
    return verdict, outcome


def held(run_dir: Path) -> str:
    """Why nothing may start this run; empty where it may."""
    path = run_dir / "control" / "held"
    try:
        return f"{path.read_text(encoding='utf-8').strip()}; when you have seen to it, remove {path}"
    except FileNotFoundError:
        return ""


def hold(run_dir: Path, reason: str) -> None:
    """Let nothing start this run until a person removes the file."""
    _write(run_dir / "control" / "held", reason + "\n")


def newest_step(run_dir: Path) -> int:
    """Step of the newest committed checkpoint, by the names of the folders alone; -1 without one."""
    found = (_STEP.fullmatch(path.name) for path in (run_dir / "checkpoints").glob("step-*"))
    return max((int(match[1]) for match in found if match), default=-1)


def _count(run_dir: Path, known: Starts, attempt: str, starts: int, reason: str) -> str:
    """Count a failure. At the last one the run is held, the count begins anew, and the reason for it is returned."""
    step = newest_step(run_dir)
    if attempt not in known.failed_at(step):
        known.failures = [(name, at) for name, at in known.failures if at == step] + [(attempt, step)]
    failed = known.failed_at(step)
    if len(failed) < starts:
        return ""
    since = f"checkpoint {step}" if step >= 0 else "the beginning"
    gave_up = f"given up after {len(failed)} starts that came no further than {since} ({', '.join(failed)}): {reason}"
    known.failures, known.running = [], ""
    known.write(run_dir)
    hold(run_dir, gave_up)
    return gave_up


def _ended_well(run_dir: Path, attempt: str, outcome: Outcome | None) -> bool:
    """Is there nothing to count about an attempt that nobody saw ending?"""
    if outcome is not None and outcome.attempt == attempt:
        return outcome.status is not Status.FAILED
    try:
        return (run_dir / "control" / "stop").read_text().strip() == attempt
    except OSError:
        return False


def _file(run_dir: Path) -> Path:
    return run_dir / "control" / "starts.json"


def _write(path: Path, text: str) -> None:
    private_folder(path.parent)
    replace_private(path, text)


def main(words: list[str]) -> int:
    """Print the verdict, say the outcome to people; returns its exit code, 0 where the run goes on."""
    run_dir, attempt, starts, *why = words
    verdict, outcome = end(Path(run_dir), attempt, int(starts), *why)
    step = "" if outcome.step is None else f" at step {outcome.step}"
    reason = f": {outcome.reason}" if outcome.reason else ""
    sys.stderr.write(f"{attempt}: {outcome.status}{step}{reason}\n")
    sys.stdout.write(f"{verdict}\n")
    return EXIT_CODES[outcome.status] if verdict is Verdict.STOP else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
