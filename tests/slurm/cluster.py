"""A real SLURM of two nodes on this machine: munged, slurmctld and two slurmd, all below one temporary folder.

No accounting database, no cgroups, nothing of the system's own configuration is read or changed. Its processes are
found again by the folder's name in their environment, so nothing of it is left behind and nothing else is touched.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self

import pytest

from nemo_opd.reliability.child import end_with_parent
from tests.slurm.reaper import processes, reap

ROOT = Path(__file__).parents[2]

NODES = ("n1", "n2")
START_SECONDS = 60.0
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
_NODE = "NEMO_OPD_TEST_NODE"

CONFIGURATION = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=60
MessageTimeout=60
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=n1 NodeAddr=127.0.0.1 NodeHostname=localhost Port={ports[1]} CPUs=2
NodeName=n2 NodeAddr=127.0.0.1 NodeHostname=localhost Port={ports[2]} CPUs=2
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=9
"""
"""A job that is requeued waits until its credentials are out of date: 5 s here, SLURM's default is 120."""


def need_slurm() -> None:
    """Skip where there is no SLURM, but not in CI."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    if missing and not os.environ.get("CI"):
        pytest.skip(f"no {', '.join(missing)} here; `make test` as root on Debian installs slurm-wlm and munge")
    assert not missing, f"CI installs SLURM, but {missing} are not there"


class Cluster:
    """``with Cluster() as cluster: cluster.call("sinfo")``"""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="opd-slurm-"))
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        command = [sys.executable, "-m", "tests.slurm.reaper", str(self.folder)]
        self._reaper = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=ROOT, start_new_session=True)
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH", "SRUN"))},
            "PATH": _PATH,
            "SLURM_CONF": str(self.folder / "slurm.conf"),
        }

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        self.folder.chmod(0o755)
        for name in ("munge", "state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir()
        text = CONFIGURATION.format(folder=self.folder, ports=_free_ports(3), user=pwd.getpwuid(os.getuid()).pw_name)
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        self._start_munge()
        self._daemon("slurmctld", "slurmctld", "-D")
        for node in NODES:
            self.start_node(node)
        until(lambda: self.call("sinfo", "-h", "-o", "%D %T") == "2 idle", START_SECONDS, "two idle nodes", self.logs)

    def _start_munge(self) -> None:
        """As its own user where we are root, as it asks for."""
        folder, user = self.folder / "munge", None
        (folder / "key").write_bytes(os.urandom(256))
        (folder / "key").chmod(0o400)
        if os.getuid() == 0:
            user = "munge"
            for path in (folder, folder / "key"):
                shutil.chown(path, user, user)
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={folder / name}" for option, name in files.items()]
        self._daemon("munged", "munged", "--foreground", "--force", "--num-threads=2", *options, user=user)
        until((folder / "socket").exists, START_SECONDS, "munge's socket", self.logs)

    def start_node(self, node: str) -> None:
        self._daemon(f"slurmd-{node}", "slurmd", "-D", "-N", node, **{_NODE: node})

    def kill_node(self, node: str) -> None:
        """What a power failure does: its daemon and all processes of its steps are gone at once."""
        for pid in processes(self.folder, [f"{_NODE}={node}", f"SLURMD_NODENAME={node}"]):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._daemons[f"slurmd-{node}"].wait()
        shutil.rmtree(self.folder / f"spool-{node}")  # as after a reboot: nothing waits for steps that are no more
        (self.folder / f"spool-{node}").mkdir()

    def kill_tasks(self, node: str, words: str) -> int:
        """Kill the processes of steps on a node whose command line holds `words`; returns how many there were."""
        found = [pid for pid in processes(self.folder, [f"SLURMD_NODENAME={node}"]) if words in _command_line(pid)]
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(found)

    def _daemon(self, name: str, *command: str, user: str | None = None, **environment: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**self.environment, **environment},
                cwd="/",
                user=user,
                group=user,
                extra_groups=None if user is None else [],
                start_new_session=True,
                preexec_fn=lambda: end_with_parent(signal.SIGKILL),
            )

    def call(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        """Run a command of SLURM's in its environment; returns what it prints. Raises CalledProcessError."""
        done = subprocess.run(
            command, env={**self.environment, **environment}, cwd=cwd, capture_output=True, text=True, check=False
        )
        if done.returncode and command[0] != "sinfo":
            raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What ``scontrol show job`` says: JobState, Restarts, Reason, ExitCode, ...; of the first component."""
        words = self.call("scontrol", "show", "job", "--oneliner", number).partition("\n")[0].split(" ")
        return dict(word.split("=", 1) for word in words if "=" in word)

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(f"{path.name}:\n{path.read_text()[-1500:]}" for path in sorted(self.folder.glob("*.log")))

    def close(self) -> None:
        """End everything that belongs to it, also what escaped its daemons. Idempotent."""
        reap(self.folder)
        for daemon in self._daemons.values():
            daemon.wait()
        self._reaper.communicate()


def until(true: Callable[[], bool], seconds: float, what: str, explain: Callable[[], str] = str) -> None:
    """Wait for something; fails with an explanation when it does not come."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            pytest.fail(f"no {what} after {seconds:g} s\n{explain()}")
        time.sleep(0.1)


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
    except OSError:
        return ""


def _free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(listener.getsockname()[1]) for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports
