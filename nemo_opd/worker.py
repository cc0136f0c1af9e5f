"""What one process of a run does around the loop: join its launcher, keep its own log, say how it ended.

python -m nemo_opd.worker RESOLVED.yaml        as our own launcher starts it (through torchrun)
"""

from __future__ import annotations

import functools
import logging
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

from nemo_opd.config import Config
from nemo_opd.configuration.check import launched_processes
from nemo_opd.configuration.load import load
from nemo_opd.errors import ConfigError
from nemo_opd.reliability import redact
from nemo_opd.reliability.child import end_with_parent
from nemo_opd.reliability.files import open_private, private_descriptor, private_folder
from nemo_opd.reliability.lock import RunLocked
from nemo_opd.reliability.outcome import ATTEMPT_VARIABLE, EXIT_CODES, SAVED, Status, current_attempt, write_failure

log = logging.getLogger(__name__)


def run(config: Config) -> int:
    """Train in this process, alone or as one of a launcher's; returns the exit code of `reliability.outcome`."""
    launched = launched_processes() is not None
    rank = join_launcher() if launched else 0
    tame_helpers()
    folder = Path(config.run.dir)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    attempt = os.environ.setdefault(ATTEMPT_VARIABLE, current_attempt())
    code = _guarded(config, folder, attempt, rank)
    return 0 if launched and code in [EXIT_CODES[status] for status in SAVED] else code


def _guarded(config: Config, folder: Path, attempt: str, rank: int) -> int:
    try:
        _open_logs(folder, rank)
        from nemo_opd import session  # late: torch, Megatron and NeMo take seconds to import

        return session.run(config)
    except RunLocked as error:  # not our folder: nothing is written into it
        return _say(error)
    except ConfigError as error:
        write_failure(folder, Status.CONFIG_ERROR, str(error), attempt, rank)
        return _say(error)
    except KeyboardInterrupt:
        raise
    except Exception as error:  # whatever it is, the run ends here, and its reason must reach outcome.json
        log.exception("rank %d failed", rank)
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        write_failure(folder, Status.FAILED, reason, attempt, rank)
        return EXIT_CODES[Status.FAILED]


def _open_logs(folder: Path, rank: int) -> None:
    if rank > 0:
        write_output_to(folder / "logs" / f"rank-{rank}.txt")
    configure_logging()
    if rank == 0:
        log_to(folder / "log.txt")


def join_launcher() -> int:
    """Make an srun launch look like torchrun's, tie this process's life to its launcher's; returns the rank."""
    if "RANK" not in os.environ:
        for ours, theirs in (("RANK", "PROCID"), ("WORLD_SIZE", "NTASKS"), ("LOCAL_RANK", "LOCALID")):
            os.environ[ours] = os.environ[f"SLURM_{theirs}"]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(signal.SIGKILL)
    return int(os.environ["RANK"])


@functools.cache  # once is enough
def tame_helpers() -> None:
    """Have processes that are forked from this one (an engine's helpers) end with it, and leave a request to stop
    to it: they inherit its handlers, and Ctrl-C in a terminal reaches them too."""
    os.register_at_fork(after_in_child=_tame)


def _tame() -> None:
    end_with_parent(signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def write_output_to(path: Path) -> None:
    """Send this process's stdout and stderr, also what C++ libraries write, to a file (appended)."""
    private_folder(path.parent)
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = private_descriptor(path, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


class _PrivateFile(logging.FileHandler):
    """Opened as `reliability.files` does it."""

    def _open(self) -> Any:
        return open_private(Path(self.baseFilename), "a")


def log_to(path: Path) -> None:
    """Let the project's log also go to `path` (appended; opened with the first message), until the process ends.

    Raises ConfigError for a link in its place.
    """
    if os.path.lexists(path):
        os.close(private_descriptor(path, os.O_WRONLY))
    handler = _PrivateFile(path, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger("nemo_opd").addHandler(handler)


_KNOWN_WARNINGS = (
    ".*Transformer Engine and Apex are not installed",  # the CPU path is chosen on purpose
    "Apex is not installed",
    ".*dist_checkpointing.load_common_state_dict.*",
)
_CHATTY = ("nv_one_logger", "OneLogger", "torch.distributed.elastic.multiprocessing.redirects")


def configure_logging() -> None:
    """Our messages from INFO on and other libraries' warnings, on stderr, without those that say nothing new here.
    Secrets are taken out of them all."""
    redact.install()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("nemo_opd").setLevel(logging.INFO)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def _say(error: ConfigError) -> int:
    sys.stderr.write(redact.redact(f"error: {error}\n"))
    return EXIT_CODES[Status.CONFIG_ERROR]


def main() -> int:
    try:
        return run(load(Path(sys.argv[1])))
    except ConfigError as error:
        return _say(error)


if __name__ == "__main__":  # processes that are started with "spawn" import this module again
    sys.exit(main())
