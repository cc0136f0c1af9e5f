"""Starts a run: in this process, in processes of its own on this machine, or as one process of a launcher's.

The processes run under torchrun in a session of their own, so a terminal's Ctrl-C reaches only this parent. The first
one becomes a stop request, a file that names this attempt: the run saves a checkpoint and ends. The second one ends all
processes at once. When the parent itself is killed, torchrun gets SIGTERM from the kernel and the run stops likewise.

A start that failed, or of which processes vanished, is followed by another one, with an attempt's name of its own, as
long as there are new checkpoints, and `run.restarts` times without any. A run that was asked to stop, that stopped by
itself or that cannot work as it is configured is not started again.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from nemo_opd import worker
from nemo_opd.config import Config
from nemo_opd.configuration.check import launched_processes, world_size
from nemo_opd.configuration.load import to_yaml
from nemo_opd.reliability.child import end_with_parent
from nemo_opd.reliability.files import private_folder, replace_private, write_private
from nemo_opd.reliability.lock import RunLock, probe
from nemo_opd.reliability.outcome import (
    ATTEMPT_VARIABLE,
    EXIT_CODES,
    INTERRUPTED,
    Status,
    new_attempt,
    read_outcome,
)

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_TAIL = 5  # lines of a failed rank's log that are shown


def start(config: Config) -> int:
    """Run a checked configuration to its end; returns the exit code of `reliability.outcome`.

    Raises:
        RunLocked: another process uses the run folder.
    """
    if launched_processes() is not None:
        return worker.run(config)
    folder = Path(config.run.dir)
    with RunLock(folder, "start"):
        probe(folder, "run")
        attempt = new_attempt()
        processes = world_size(config)
        if processes > 1:
            return _start_processes(config, folder, attempt, processes)
        os.environ[ATTEMPT_VARIABLE] = attempt
        return worker.run(config)


def torchrun_command(processes: int, attempt: str, log_dir: Path, program: Sequence[str]) -> list[str]:
    """torchrun on this machine alone, with its rendezvous on the loopback address and a port that is free.

    `program` is what each process runs: ``["-m", "module", ...]`` or ``["file.py", ...]``.
    """
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes", "1", "--nproc-per-node", str(processes)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--rdzv-id", attempt),
        *("--local-addr", "127.0.0.1", "--log-dir", str(log_dir)),
        *program,
    ]


def child_environment(processes: int, attempt: str, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The caller's environment with the attempt's name and, where the caller did not choose them, threads per process
    (the cores that we may use, shared out) and the loopback interface for gloo."""
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    defaults = {"OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": "lo"}
    return {**defaults, **environment, ATTEMPT_VARIABLE: attempt}


def request_stop(run_dir: Path, attempt: str) -> None:
    """Ask an attempt to save a checkpoint and end. Written aside and renamed: a reader never sees half a name."""
    replace_private(private_folder(run_dir / "control") / "stop", attempt + "\n")


class Children:
    """torchrun and the processes below it, and what a signal to us means for them."""

    def __init__(self, run_dir: Path, attempt: str, saves: bool = True) -> None:
        """`saves`: the first signal asks for a checkpoint; otherwise it ends all processes at once."""
        self._run_dir, self._saves = run_dir, saves
        self._attempt = attempt
        self._process: subprocess.Popen[bytes] | None = None
        self.asked = False
        self.killed = False

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> int:
        """Run the command to its end, whatever signals come; returns its exit status."""
        with self._listening():
            try:
                self._process = subprocess.Popen(
                    command,
                    env=dict(environment),
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                    preexec_fn=_end_with_us(os.getpid()),
                )
                return self._process.wait()
            finally:
                self.kill()
                if self._process is not None:
                    self._process.wait()

    def kill(self) -> None:
        """End torchrun and every process below it, at once. Its workers are heads of process groups of their own."""
        if self._process is None or self._process.poll() is not None:
            return
        for leader in [*_children(self._process.pid), self._process.pid]:
            with suppress(ProcessLookupError):
                os.killpg(leader, signal.SIGKILL)

    @contextmanager
    def _listening(self) -> Iterator[None]:
        heard = [number for number in _STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup
        before = {number: signal.signal(number, self._on_signal) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self._saves or (self.asked and number == signal.SIGINT):
            self.killed = True
            self.kill()
        elif not self.asked:
            self.asked = True
            request_stop(self._run_dir, self._attempt)
            _say("\nstopping, with a checkpoint of what is trained (Ctrl-C again: at once, without one)")


def _start_processes(config: Config, folder: Path, attempt: str, processes: int) -> int:
    """Start the processes, and again after a failure while that gets the run on; returns the last start's code."""
    in_vain, newest = 0, newest_step(folder)
    while True:
        code, asked = _one_start(config, folder, attempt, processes)
        if code != EXIT_CODES[Status.FAILED] or asked:
            return code
        before, newest = newest, newest_step(folder)
        in_vain = 0 if newest > before else in_vain
        if in_vain == config.run.restarts:
            return code
        in_vain += 1
        attempt = new_attempt()
        _say(
            f"starting again from {f'step {newest}' if newest else 'the beginning'} "
            f"({in_vain} of at most {config.run.restarts} times without a new checkpoint, run.restarts)"
        )


def newest_step(folder: Path) -> int:
    """The greatest step of a committed checkpoint, 0 without any."""
    names = [path.name.removeprefix("step-") for path in (folder / "checkpoints").glob("step-*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def _one_start(config: Config, folder: Path, attempt: str, processes: int) -> tuple[int, bool]:
    """The exit code, and whether somebody asked it to stop."""
    control = private_folder(folder / "control")
    recipe, torchrun_logs = control / f"recipe-{attempt}.yaml", control / f"torchrun-{attempt}"
    write_private(recipe, to_yaml(config))  # whole, with what may be a secret: it is deleted at the end
    command = torchrun_command(processes, attempt, torchrun_logs, ["-m", "nemo_opd.worker", str(recipe)])
    children = Children(folder, attempt)
    try:
        status = children.run(command, child_environment(processes, attempt))
    finally:
        recipe.unlink(missing_ok=True)
        shutil.rmtree(torchrun_logs, ignore_errors=True)
    if children.killed:
        _say(f"interrupted; the newest checkpoint is in {folder / 'checkpoints'}")
        return INTERRUPTED, True
    return conclusion(folder, attempt, status), children.asked


def conclusion(folder: Path, attempt: str, status: int) -> int:
    """The exit code that this attempt's outcome asks for; processes that left none have failed."""
    outcome = read_outcome(folder)
    if outcome is None or outcome.attempt != attempt:
        _say(
            f"error: the processes ended (status {status}) without an outcome; see the messages above and {folder}/logs"
        )
        return EXIT_CODES[Status.FAILED]
    if outcome.status is Status.DIAGNOSED:
        _say(f"stopped by the diagnosis, with a checkpoint: {outcome.reason}")
    if outcome.status in (Status.FAILED, Status.CONFIG_ERROR):
        _say(f"error: rank {outcome.rank}: {outcome.reason}")
        if outcome.status is Status.FAILED:  # a killed process cannot speak: others then report what that did to them
            _say("torchrun's table above names the process that failed first")
        log = folder / "logs" / f"rank-{outcome.rank}.txt"
        if outcome.rank > 0 and log.exists():
            _say("\n".join(["", f"the end of {log}:", *log.read_text(errors="replace").splitlines()[-_TAIL:]]))
    return outcome.exit_code


def _end_with_us(parent: int) -> Callable[[], None]:
    """What the child does between fork and exec: get SIGTERM when `parent` dies."""

    def between_fork_and_exec() -> None:
        end_with_parent(signal.SIGTERM)
        if os.getppid() != parent:  # it died before the kernel was asked
            os._exit(1)

    return between_fork_and_exec


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:  # gone already, or a system without /proc: the workers then end with torchrun by themselves
        return []


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
