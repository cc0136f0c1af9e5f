"""Processes of a run: how they are started, stopped, and not left behind. The children are small scripts that obey the
same files and signals as a real run; torchrun is the real one where a test says so."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import psutil
import pytest

import nemo_opd
from nemo_opd import launch, worker
from nemo_opd.config import Config
from nemo_opd.errors import ConfigError
from nemo_opd.launch import Children, child_environment, conclusion, request_stop, torchrun_command
from nemo_opd.reliability.lock import RunLocked
from nemo_opd.reliability.outcome import (
    ATTEMPT_VARIABLE,
    EXIT_CODES,
    INTERRUPTED,
    Outcome,
    Status,
    read_outcome,
    write_outcome,
)

DEADLINE = 90  # seconds until a test that waits for a process gives up

PARENT = """
import os, signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with SIGINT ignored
from nemo_opd.launch import Children, child_environment, conclusion, torchrun_command
from nemo_opd.reliability.outcome import INTERRUPTED
folder = Path(sys.argv[1])
children = Children(folder, "this-attempt")
command = torchrun_command(2, "this-attempt", folder / "torchrun", [str(folder / "work.py"), str(folder)])
status = children.run(command, child_environment(2, "this-attempt"))
sys.exit(INTERRUPTED if children.killed else conclusion(folder, "this-attempt", status))
"""

WORK = """
import os, signal, subprocess, sys, time
from pathlib import Path
from nemo_opd import launch, worker
from nemo_opd.reliability.outcome import write_outcome
folder, rank, mode = Path(sys.argv[1]), worker.join_launcher(), os.environ.get("TEST_MODE", "obey")
signal.signal(signal.SIGTERM, signal.SIG_IGN)
grandchild = subprocess.Popen(["sleep", "600"]) if mode == "deaf" else None
(folder / f"pid-{rank}").write_text(" ".join(str(p) for p in [os.getpid(), grandchild and grandchild.pid] if p))
threads, attempt = os.environ["OMP_NUM_THREADS"], os.environ["NEMO_OPD_ATTEMPT"]
(folder / f"environment-{rank}").write_text(f"{os.environ['WORLD_SIZE']} {threads} {attempt}")
if mode == "finish":
    if rank == 0:
        write_outcome(folder, "done", 7, "", attempt)
    sys.exit(0)
stop = folder / "control" / "stop"
while mode == "deaf" or not (stop.exists() and stop.read_text().strip() == attempt):
    time.sleep(0.02)
if rank == 0:
    write_outcome(folder, "preempted", 3, "asked", attempt)
"""


class Parent:
    """A launcher in a process of its own, with two real torchrun workers."""

    def __init__(self, folder: Path, mode: str) -> None:
        self.folder = folder
        (folder / "work.py").write_text(WORK)
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        environment |= {"TEST_MODE": mode}
        command = [sys.executable, "-c", PARENT, str(folder)]
        self.process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    def __enter__(self) -> Parent:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()  # a test that failed leaves nothing behind: the kernel tells torchrun, which tells the rest
        self.process.wait()

    def workers(self) -> list[int]:
        """Process ids of the workers and what they started, once both workers are up."""
        files = [self.folder / "pid-0", self.folder / "pid-1"]
        wait_until(lambda: all(file.exists() and file.read_text() for file in files))
        return [int(pid) for file in files for pid in file.read_text().split()]

    def end(self) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=DEADLINE)
        return self.process.returncode, errors


def wait_until(condition) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_two_processes_run_to_their_end(tmp_path: Path) -> None:
    with Parent(tmp_path, "finish") as parent:
        code, errors = parent.end()
    assert (code, errors) == (0, ""), "no launcher's chatter on a run that went well"
    assert read_outcome(tmp_path) == Outcome(Status.DONE, 7, "", "this-attempt", 0)
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    for rank in (0, 1):
        assert (tmp_path / f"environment-{rank}").read_text() == f"2 {threads} this-attempt"


def test_ctrl_c_becomes_a_stop_request(tmp_path: Path) -> None:
    with Parent(tmp_path, "obey") as parent:
        pids = parent.workers()
        parent.process.send_signal(signal.SIGINT)
        code, errors = parent.end()
    assert code == EXIT_CODES[Status.PREEMPTED]
    assert "stopping, with a checkpoint of what is trained" in errors
    assert not any(alive(pid) for pid in pids)


def test_a_second_ctrl_c_ends_everything_at_once(tmp_path: Path) -> None:
    with Parent(tmp_path, "deaf") as parent:
        pids = parent.workers()
        assert len(pids) == 4
        parent.process.send_signal(signal.SIGINT)
        wait_until((tmp_path / "control" / "stop").exists)
        assert all(alive(pid) for pid in pids)
        parent.process.send_signal(signal.SIGINT)
        code, _ = parent.end()
    assert code == INTERRUPTED
    wait_until(lambda: not any(alive(pid) for pid in pids))


def test_a_killed_torchrun_takes_its_workers_along(tmp_path: Path) -> None:
    with Parent(tmp_path, "obey") as parent:
        pids = parent.workers()
        torchrun = int(Path(f"/proc/{pids[0]}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(torchrun, signal.SIGKILL)
        code, errors = parent.end()
    assert code == EXIT_CODES[Status.FAILED]
    assert "ended (status -9) without an outcome" in errors
    wait_until(lambda: not any(alive(pid) for pid in pids))


def test_a_killed_parent_asks_its_processes_to_end(tmp_path: Path) -> None:
    """The kernel sends them SIGTERM; the real torchrun hands it on to its workers."""
    script = "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
    script += f"open({str(tmp_path / 'pid')!r}, 'w').write(str(__import__('os').getpid()))\ntime.sleep(600)"
    parent = subprocess.Popen(
        [sys.executable, "-c", "import sys; from pathlib import Path; from nemo_opd.launch import Children\n"
         f"Children(Path({str(tmp_path)!r}), 'a').run([sys.executable, '-c', {script!r}], {{}})"]
    )  # fmt: skip
    wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    pid = int((tmp_path / "pid").read_text())
    parent.kill()
    parent.wait()
    wait_until(lambda: not alive(pid))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_other_signals_ask_for_a_stop_too(tmp_path: Path, number: signal.Signals) -> None:
    code = f"import os, time; os.kill(os.getppid(), {int(number)})\n"
    code += f"while not os.path.exists({str(tmp_path / 'control' / 'stop')!r}): time.sleep(0.01)"
    before = signal.signal(number, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        assert Children(tmp_path, "a").run([sys.executable, "-c", code], os.environ) == 0
    finally:
        signal.signal(number, before)
    assert (tmp_path / "control" / "stop").read_text() == "a\n"


def test_what_nohup_ignores_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        code = f"import os; os.kill(os.getppid(), {int(signal.SIGHUP)})"
        assert Children(tmp_path, "a").run([sys.executable, "-c", code], os.environ) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert not (tmp_path / "control").exists()


def test_children_do_not_share_our_session_nor_our_input(tmp_path: Path) -> None:
    code = "import os, sys; sys.exit(0 if os.getsid(0) == os.getpid() and not sys.stdin.read() else 1)"
    before = signal.getsignal(signal.SIGINT)
    assert Children(tmp_path, "a").run([sys.executable, "-c", code], os.environ) == 0
    assert signal.getsignal(signal.SIGINT) is before


def test_a_request_names_one_attempt_only(tmp_path: Path) -> None:
    request_stop(tmp_path, "first")
    request_stop(tmp_path, "second")
    assert [path.name for path in (tmp_path / "control").iterdir()] == ["stop"]
    assert (tmp_path / "control" / "stop").read_text() == "second\n"


def test_the_caller_s_own_choices_stay() -> None:
    mine = {"OMP_NUM_THREADS": "7", "GLOO_SOCKET_IFNAME": "eth0", "X": "1"}
    assert child_environment(2, "a", mine) == {**mine, ATTEMPT_VARIABLE: "a"}
    assert child_environment(1000, "a", {})["OMP_NUM_THREADS"] == "1"


def test_rendezvous_stays_on_this_machine(tmp_path: Path) -> None:
    command = torchrun_command(4, "a", tmp_path, ["x.py"])
    assert command[command.index("--rdzv-endpoint") + 1] == "127.0.0.1:0"
    assert command[command.index("--nproc-per-node") + 1] == "4"


class TestConclusion:
    def test_of_another_attempt_counts_as_none(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write_outcome(tmp_path, "done", 9, "", "yesterday")
        assert conclusion(tmp_path, "today", 1) == EXIT_CODES[Status.FAILED]
        assert "error: the processes ended (status 1) without an outcome" in capsys.readouterr().err

    def test_of_a_failed_rank_shows_the_end_of_its_log(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "logs").mkdir()
        (tmp_path / "logs" / "rank-1.txt").write_text("".join(f"line {i}\n" for i in range(100)))
        write_outcome(tmp_path, "failed", None, "ValueError: bad", "a", rank=1)
        assert conclusion(tmp_path, "a", 1) == EXIT_CODES[Status.FAILED]
        errors = capsys.readouterr().err
        assert errors.startswith("error: rank 1: ValueError: bad\ntorchrun's table above names")
        assert "line 99" in errors
        assert "line 90" not in errors

    @pytest.mark.parametrize("status", Status)
    def test_gives_the_status_its_code(self, tmp_path: Path, status: Status) -> None:
        write_outcome(tmp_path, status, 1, "", "a")
        assert conclusion(tmp_path, "a", 0) == EXIT_CODES[status]


class TestWorker:
    """The frame around the loop; the loop itself is replaced by what it may raise or return."""

    @pytest.fixture
    def config(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
        for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "TORCHELASTIC_RUN_ID"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(ATTEMPT_VARIABLE, "a")
        config = Config()
        config.run.dir = str(tmp_path / "run")
        return config

    def end_with(self, monkeypatch: pytest.MonkeyPatch, result: int | BaseException) -> None:
        session = types.ModuleType("nemo_opd.session")

        def run(config: Config) -> int:
            if isinstance(result, BaseException):
                raise result
            return result

        monkeypatch.setattr(session, "run", run, raising=False)
        monkeypatch.setitem(sys.modules, "nemo_opd.session", session)
        monkeypatch.setattr(nemo_opd, "session", session, raising=False)

    @pytest.mark.parametrize(
        ("error", "code", "status", "reason"),
        [
            (ValueError("bad\nworse"), 70, Status.FAILED, "ValueError: bad"),
            (ConfigError("k", "g", "e", "w"), 2, Status.CONFIG_ERROR, "k: got g; expected e; w"),
        ],
    )
    def test_an_error_reaches_the_outcome(
        self, config: Config, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, status: Status, reason: str
    ) -> None:
        self.end_with(monkeypatch, error)
        assert worker.run(config) == code
        assert read_outcome(Path(config.run.dir)) == Outcome(status, None, reason, "a", 0)

    def test_a_folder_that_belongs_to_another_run_is_left_alone(
        self, config: Config, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.end_with(monkeypatch, RunLocked("run.dir", "g", "e", "w"))
        assert worker.run(config) == 2
        assert read_outcome(Path(config.run.dir)) is None

    def test_a_stopped_run_is_no_failure_to_a_launcher(self, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
        self.end_with(monkeypatch, EXIT_CODES[Status.PREEMPTED])
        assert worker.run(config) == 75
        for name, value in {"MASTER_ADDR": "x", "MASTER_PORT": "1", "RANK": "0", "WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        assert worker.run(config) == 0

    def test_srun_s_variables_become_torchrun_s(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(os, "environ", dict(os.environ))
        os.environ |= {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}
        assert worker.join_launcher() == 5
        assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["5", "8", "1"]

    def test_a_forked_helper_ends_with_its_process_and_not_with_ctrl_c(self) -> None:
        code = (
            "import os, signal, sys, time; from nemo_opd.worker import tame_helpers; tame_helpers()\n"
            "child = os.fork()\n"
            "if child == 0:\n"
            "    os.kill(os.getpid(), signal.SIGINT); os.write(1, f'{os.getpid()}\\n'.encode())\n"
            "time.sleep(60)\n"
        )
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            helper = int(process.stdout.readline())
            process.kill()
        deadline = time.monotonic() + DEADLINE
        while psutil.pid_exists(helper) and psutil.Process(helper).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, "the helper outlived its process"
            time.sleep(0.05)

    def test_output_of_other_ranks_goes_to_a_file(self, tmp_path: Path) -> None:
        code = "import os, sys; from pathlib import Path; from nemo_opd.worker import write_output_to\n"
        code += "write_output_to(Path(sys.argv[1])); os.write(1, b'from C\\n'); sys.stderr.write('from Python\\n')"
        path = tmp_path / "logs" / "rank-1.txt"
        done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, check=True)
        assert (done.stdout, done.stderr) == (b"", b"")
        assert path.read_text() == "from C\nfrom Python\n"


class TestStartingAgain:
    """Starts are made up; real ones are in tests/reliability/test_restarts.py."""

    FAILED, DONE = EXIT_CODES[Status.FAILED], 0

    def started(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, ends: list[tuple[int, int, bool]]
    ) -> tuple[int, list[str]]:
        """The exit code and the attempts, where the n-th start ends with (code, newest step, asked to stop)."""
        attempts: list[str] = []

        def one_start(config: Config, folder: Path, attempt: str, processes: int) -> tuple[int, bool]:
            code, step, asked = ends[len(attempts)]
            attempts.append(attempt)
            (folder / "checkpoints" / f"step-{step:08d}").mkdir(parents=True, exist_ok=True)
            return code, asked

        monkeypatch.setattr(launch, "_one_start", one_start)
        return launch._start_processes(Config(), folder, "first", 2), attempts

    def test_what_always_fails_at_the_same_step_is_started_three_times(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code, attempts = self.started(tmp_path, monkeypatch, [(self.FAILED, 0, False)] * 9)
        assert (code, len(attempts), len(set(attempts))) == (self.FAILED, 3, 3)
        assert "starting again from the beginning (2 of at most 2 times without a new" in capsys.readouterr().err

    def test_what_gets_on_is_started_as_often_as_it_takes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ends = [(self.FAILED, step // 2, False) for step in range(2, 20)]
        code, attempts = self.started(tmp_path, monkeypatch, [*ends, (self.DONE, 10, False)])
        assert (code, len(attempts)) == (self.DONE, 19)

    @pytest.mark.parametrize("status", [s for s in Status if s is not Status.FAILED])
    def test_what_did_not_fail_is_not_started_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: Status
    ) -> None:
        assert len(self.started(tmp_path, monkeypatch, [(EXIT_CODES[status], 1, False)])[1]) == 1

    def test_what_failed_when_it_was_asked_to_stop_is_not_started_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert len(self.started(tmp_path, monkeypatch, [(self.FAILED, 1, True)])[1]) == 1
