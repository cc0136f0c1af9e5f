"""Does a SLURM job, or the script that asks for one, have what the recipe needs?"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from nemo_opd.cluster.plan import ROLES, TRAINER, dealt
from nemo_opd.config import Config
from nemo_opd.configuration.check import launched_processes, world_size
from nemo_opd.doctor.finding import Finding, Verdict, at_most
from nemo_opd.errors import ConfigError
from nemo_opd.reliability.budget import END_VARIABLE, GRACE_VARIABLE, last_save

JOB_VARIABLE = "SLURM_JOB_ID"
SITE, SCRIPT = Path("slurm/env.sh"), Path("slurm/opd.sh")
_SECONDS = 10.0
_DIRECTIVE = re.compile(r"#SBATCH\s+--([a-z-]+)(?:[=\s]\s*(\S+))?")

Show = Callable[[str], str]
"""What SLURM says of the job with that number, in one line; empty where it says nothing."""


@dataclass(frozen=True)
class Job:
    """What a job has, or a script asks for; None where it is not said."""

    nodes: tuple[int, ...] | None = None
    """Of each component; of a job that is not heterogeneous one number."""
    per_node: int | None = None
    """Processes of the trainer on each of its nodes."""
    grace: float | None = None
    """Seconds between the signal to stop and the end that the run is told of."""
    by_script: bool = True
    """Do its processes come from opd.sh? A person in a job of one node may start others by hand."""


def show_job(number: str) -> str:
    """``JobId=12 JobName=opd ... Requeue=1 ... TimeLimit=04:00:00 ...``"""
    command = ["scontrol", "show", "job", "--oneliner", number]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def slurm_findings(
    config: Config,
    environment: Mapping[str, str] = os.environ,
    show: Show = show_job,
    folder: Path = Path(),
) -> list[Finding]:
    """Of the job that this is in; else of the script in `folder`, where jobs can be asked for."""
    job = job_of(environment, folder)
    if job is not None:
        said = show(environment[JOB_VARIABLE])
        ends = [requeued(_field(said, "Requeue")), end(config, environment, _field(said, "TimeLimit"))]
        return [*placed(config, job), grace(config, job), *ends]
    if shutil.which("sbatch", path=environment.get("PATH", "")) is None:
        return [Finding("slurm", Verdict.SKIPPED, "not in a job, and no sbatch here")]
    if not (folder / SCRIPT).is_file():
        return [Finding("slurm", Verdict.SKIPPED, f"not in a job, and no {SCRIPT} in this folder")]
    return script_findings(config, folder)


def job_of(environment: Mapping[str, str], folder: Path = Path()) -> Job | None:
    """The job that this process is in."""
    if not environment.get(JOB_VARIABLE):
        return None
    components = int(environment.get("SLURM_HET_SIZE") or 0)
    names = [f"SLURM_JOB_NUM_NODES_HET_GROUP_{number}" for number in range(components)]
    counts = [_count(environment.get(name)) for name in names or ["SLURM_JOB_NUM_NODES"]]
    known = tuple(count for count in counts if count is not None)
    local = _count(environment.get("LOCAL_WORLD_SIZE")) if launched_processes(environment) else None
    site = _site(folder)
    each = local or site.per_node or _count(environment.get("SLURM_GPUS_ON_NODE")) or 1
    told = environment.get(GRACE_VARIABLE, "")
    seconds = float(told) if told.isdigit() else site.grace
    nodes = known if len(known) == len(counts) else None
    return Job(nodes, each, seconds, GRACE_VARIABLE in environment)


def trainer_nodes(config: Config, job: Job) -> int:
    """1 where it is not known, or does not fit: another check says so."""
    try:
        return len(_dealt(config, job)[TRAINER]) if job.nodes else 1
    except ConfigError:
        return 1


def all_processes(config: Config, environment: Mapping[str, str]) -> int:
    """Processes of the run: those that a job of several nodes is given, else as `world_size`. Raises ConfigError."""
    job = job_of(environment)
    if job is None or job.per_node is None or launched_processes(environment) or trainer_nodes(config, job) < 2:
        return world_size(config, environment)
    return world_size(_with_processes(config, trainer_nodes(config, job) * job.per_node), {})


def placed(config: Config, job: Job) -> list[Finding]:
    """Nodes for each role, and processes that the layouts divide."""
    name = "slurm: nodes and processes"
    if job.nodes is None or job.per_node is None:
        return [Finding(name, Verdict.WARN, "not known", "nodes of the job", "call it in a job of sbatch or salloc")]
    bound = f"a multiple of {multiple(config)} processes"
    try:
        nodes = _dealt(config, job)
        processes = world_size(_with_processes(config, len(nodes[TRAINER]) * job.per_node), {})
    except ConfigError as error:
        verdict = Verdict.FAIL if job.by_script or sum(job.nodes) > 1 else Verdict.WARN
        return [Finding(f"{name}: {error.key}", verdict, str(error.got), error.expected, error.way_out)]
    servers = "".join(f", {len(nodes[role])} of {role} servers" for role in ROLES if role != TRAINER and nodes[role])
    return [Finding(name, Verdict.OK, f"{len(nodes[TRAINER])} x {job.per_node} = {processes}{servers}", bound)]


def multiple(config: Config) -> int:
    """The trainer's processes are so many, or a multiple of it."""
    return world_size(_with_processes(config, None), {})


def grace(config: Config, job: Job) -> Finding:
    """Seconds of the last save against those that a run is given to stop in."""
    name, way_out = "slurm: last save, s", "set grace in slurm/env.sh, and --signal=B:USR1@SECONDS with plain sbatch"
    if job.grace is None:
        return Finding(name, Verdict.WARN, "grace not known", "at most the grace", way_out)
    seconds = last_save(Path(config.run.dir))
    if seconds is None:
        return Finding(name, Verdict.OK, "none was measured yet", f"at most {job.grace:g}")
    return at_most(name, seconds, job.grace, f"{way_out}: a preempted run may lose its checkpoint", above=Verdict.WARN)


def requeued(value: str | None) -> Finding:
    """May the batch script put the job back into the queue?"""
    if value == "1":
        return Finding("slurm: requeue", Verdict.OK, "allowed", "allowed")
    way_out = "ask for it (#SBATCH --requeue), or a preempted run waits until you submit it again"
    return Finding("slurm: requeue", Verdict.WARN, "refused" if value == "0" else "not known", "allowed", way_out)


def end(config: Config, environment: Mapping[str, str], limit: str | None) -> Finding:
    """Does the run learn when its job ends, so that it saves before?"""
    name = "slurm: end of the job"
    if environment.get(END_VARIABLE) or config.run.time_limit is not None:
        told = f"run.time_limit={config.run.time_limit:g}" if config.run.time_limit is not None else "told by opd.sh"
        return Finding(name, Verdict.OK, f"{told}, limit {limit or 'not known'}", "known to the run")
    if limit is not None:  # opd.sh reads it from SLURM by itself
        return Finding(name, Verdict.OK, f"limit {limit}", "known to SLURM")
    way_out = "set run.time_limit (seconds), so that the run saves before its job is killed"
    return Finding(name, Verdict.WARN, "not known", "known to the run", way_out)


def script_findings(config: Config, folder: Path) -> list[Finding]:
    """`#SBATCH` lines of slurm/opd.sh and settings of slurm/env.sh, before there is a job."""
    said = directives((folder / SCRIPT).read_text(encoding="utf-8"))
    site = _site(folder)
    nodes = _count(said.get("nodes"))
    each = site.per_node or _count((said.get("gpus-per-node") or "").rpartition(":")[2])
    job = replace(site, nodes=None if nodes is None else (nodes,), per_node=each)
    whole = nodes is not None and nodes > 1 and each is not None  # of one node the command line says more
    rows = placed(config, job) if whole else [_needed(config)]
    return [*rows, grace(config, job), _signal(said.get("signal"), site.grace), requeued(_requeue(said))]


def directives(script: str) -> dict[str, str | None]:
    """``#SBATCH --nodes=2`` -> ``{"nodes": "2"}``; SLURM reads them up to the first command."""
    found: dict[str, str | None] = {}
    for line in script.splitlines():
        if line.strip() and not line.startswith("#"):
            break
        if matched := _DIRECTIVE.match(line):
            found[matched[1]] = matched[2]
    return found


def _needed(config: Config) -> Finding:
    least = 1 + config.cluster.rollout_nodes + config.cluster.teacher_nodes
    found = f"--nodes={least} or more, {least - 1} of them for servers"
    return Finding("slurm: nodes to ask for", Verdict.OK, found, f"a multiple of {multiple(config)} processes")


def _signal(value: str | None, grace: float | None) -> Finding:
    """With plain sbatch the script's own line counts, and the run is told what env.sh says."""
    name, bound = "slurm: signal before the end, s", "B:USR1@SECONDS"
    matched = re.fullmatch(r"B:(?:SIG)?USR1@(\d+)", value or "")
    if matched is None:
        return Finding(name, Verdict.WARN, value or "none", bound, "add #SBATCH --signal=B:USR1@SECONDS to opd.sh")
    seconds = float(matched[1])
    if grace is None or seconds == grace:
        return Finding(name, Verdict.OK, seconds, bound)
    way_out = f"submit with slurm/submit.sh, or say --signal=B:USR1@{grace:g} to sbatch"
    return Finding(name, Verdict.WARN, seconds, f"{grace:g}, the grace in {SITE}", way_out)


def _requeue(said: Mapping[str, str | None]) -> str | None:
    return "1" if "requeue" in said else "0" if "no-requeue" in said else None


def _site(folder: Path) -> Job:
    """What slurm/env.sh says in plain numbers; 180 s where it says nothing, as opd.sh takes it."""
    try:
        text = (folder / SITE).read_text(encoding="utf-8")
    except OSError:
        return Job(grace=180.0)
    words = [word for line in text.splitlines() for word in line.partition("#")[0].split()]
    values = dict(word.split("=", 1) for word in words if word.startswith(("grace=", "processes_per_node=")))
    seconds = values.get("grace", "180")
    return Job(per_node=_count(values.get("processes_per_node")), grace=float(seconds) if seconds.isdigit() else None)


def _dealt(config: Config, job: Job) -> dict[str, tuple[str, ...]]:
    assert job.nodes is not None
    return dealt(config, [[f"{part}-{n}" for n in range(count)] for part, count in enumerate(job.nodes)])


def _with_processes(config: Config, processes: int | None) -> Config:
    return replace(config, train=replace(config.train, processes=processes))


def _field(line: str, name: str) -> str | None:
    matched = re.search(rf"(?:^|\s){name}=(\S+)", line)
    return matched[1] if matched else None


def _count(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() and int(text) else None
