"""Are there as many GPUs here as processes, and do servers have others?

python -m nemo_opd.doctor.gpus        what torch sees, as JSON: in a process that ends, since a CUDA context stays where
                                      it was made and would take memory from what is measured later
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nemo_opd.config import Config, ServersConfig
from nemo_opd.configuration.check import launched_processes, world_size
from nemo_opd.doctor.finding import Finding, Verdict, at_least
from nemo_opd.doctor.network import server_sections
from nemo_opd.doctor.slurm import JOB_VARIABLE, job_of, trainer_nodes

DRIVER = (Path("/dev/nvidiactl"), Path("/dev/dxg"))
"""One of these is there where a driver is. Without it torch is not asked, as importing it takes seconds."""
VISIBLE = "CUDA_VISIBLE_DEVICES"
SECONDS = 120.0
FREE_SHARE = 0.9
"""Of a GPU's memory; with less of it free somebody else computes there."""
SHARED = 0.5
"""Servers may have so much of a GPU that a process uses too, before it is a failure."""
_GIB = float(1 << 30)


@dataclass(frozen=True)
class Gpu:
    """Example: ``Gpu("NVIDIA H100 80GB HBM3", 84_300_000_000, 85_000_000_000)``: bytes free, and of all."""

    name: str
    free: int
    total: int


Look = Callable[[str | None], tuple[Gpu, ...]]
"""GPUs that torch sees with such a CUDA_VISIBLE_DEVICES. Raises RuntimeError where torch ends with an error."""


@functools.cache
def look(visible: str | None) -> tuple[Gpu, ...]:
    """Ask torch in a process of its own; nothing is asked without a driver."""
    if not _driver():
        return ()
    environment = {name: value for name, value in os.environ.items() if name != VISIBLE}
    environment |= {} if visible is None else {VISIBLE: visible}
    command = [sys.executable, "-m", "nemo_opd.doctor.gpus"]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"torch did not answer within {SECONDS:g} s") from None
    lines = (done.stderr if done.returncode else done.stdout).splitlines()
    if done.returncode or not lines:
        raise RuntimeError(lines[-1] if lines else f"torch ended with {done.returncode}")
    return tuple(Gpu(**fields) for fields in json.loads(lines[-1]))


def gpu_findings(config: Config, environment: Mapping[str, str] = os.environ, look: Look = look) -> list[Finding]:
    """GPUs here against the processes that are started here, and those of servers that the run starts."""
    try:
        gpus = look(environment.get(VISIBLE))
    except RuntimeError as error:
        way_out = "look at nvidia-smi; the run would meet the same error"
        return [Finding("gpus: seen", Verdict.FAIL, str(error), "an answer of torch", way_out)]
    if not gpus:
        return [_none(environment)]
    needed = processes_here(config, environment)
    names = ", ".join(sorted({gpu.name for gpu in gpus}))
    rows = [Finding("gpus: seen", Verdict.OK, f"{len(gpus)}: {names}"), _enough(len(gpus), needed)]
    least = min(gpus[:needed], key=lambda gpu: gpu.free / gpu.total)
    way_out = "somebody else computes there (nvidia-smi): end it, or choose other GPUs with CUDA_VISIBLE_DEVICES"
    bound = FREE_SHARE * least.total / _GIB
    rows.append(at_least("gpus: least free memory, GiB", least.free / _GIB, bound, way_out, below=Verdict.WARN))
    return rows + _servers(config, environment, len(gpus), needed, look)


def processes_here(config: Config, environment: Mapping[str, str] = os.environ) -> int:
    """Processes of the trainer on this node: the launcher's, those of a node of the job, else all."""
    if launched_processes(environment) and environment.get("LOCAL_WORLD_SIZE", "").isdigit():
        return int(environment["LOCAL_WORLD_SIZE"])
    job = job_of(environment)
    if job is not None and job.per_node is not None and trainer_nodes(config, job) > 1:
        return job.per_node
    return world_size(config, environment)


def _driver() -> bool:
    return any(path.exists() for path in DRIVER)


def _none(environment: Mapping[str, str]) -> Finding:
    if not _driver():
        return Finding("gpus: seen", Verdict.OK, "none, and no driver: a run is on CPU")
    way_out = f"install torch for CUDA, or look at {VISIBLE} ({environment.get(VISIBLE, 'not set')})"
    return Finding("gpus: seen", Verdict.WARN, "none, beside a driver: a run is on CPU", "GPUs", way_out)


def _enough(seen: int, needed: int) -> Finding:
    bound, way_out = f"{needed}, one for each process here", ""
    if seen < needed:
        way_out = "ask for more GPUs or nodes (slurm/README.md), or change train.processes and the layouts"
    return Finding("gpus: for processes", Verdict.FAIL if way_out else Verdict.OK, seen, bound, way_out)


def _servers(config: Config, environment: Mapping[str, str], seen: int, needed: int, look: Look) -> list[Finding]:
    """`devices` of servers number the machine's GPUs, whichever the processes may see."""
    visible = _visible(environment, seen)
    taken: dict[str, str] = {gpu: "the trainer" for gpu in visible[:needed]}
    rows, whole = [], None
    for key, servers in server_sections(config):
        if servers.urls is not None:
            continue
        elsewhere = JOB_VARIABLE in environment and _own_nodes(config, key)
        if elsewhere and "SLURM_HET_SIZE" not in environment:
            rows.append(_filled(key, servers, seen))
        if servers.devices is None:
            rows.append(_unsaid(key, servers, elsewhere))
            continue
        if whole is None:  # asked again only where the variable hides some
            whole = len(look(None)) if VISIBLE in environment else seen
        ids = [one.strip() for one in servers.devices.split(",")]
        rows.append(_devices(key, servers, ids, whole, {} if elsewhere else taken))
        if not elsewhere and servers.placement != "colocated":
            taken |= {one: key for one in ids}
    return rows


def _visible(environment: Mapping[str, str], seen: int) -> Sequence[str]:
    named = [one.strip() for one in environment.get(VISIBLE, "").split(",") if one.strip()]
    return named or [str(number) for number in range(seen)]


def _own_nodes(config: Config, key: str) -> bool:
    """Do the servers of this section stand on nodes of the job that run servers alone?"""
    return bool(config.cluster.rollout_nodes if key.startswith("rollout") else config.cluster.teacher_nodes)


def _filled(key: str, servers: ServersConfig, gpus: int) -> Finding:
    """Servers of a node that does nothing else against its GPUs, which are taken to be as many as here."""
    used, bound = servers.count * servers.tensor_parallel_size, f"{gpus}, all of the servers' node"
    verdict = Verdict.OK if used == gpus else Verdict.WARN if used < gpus else Verdict.FAIL
    way_out = "" if used == gpus else f"change {key}.count or {key}.tensor_parallel_size"
    return Finding(f"gpus: for {key}", verdict, used, bound, way_out)


def _unsaid(key: str, servers: ServersConfig, elsewhere: bool) -> Finding:
    name = f"gpus: {key}.devices"
    if elsewhere or servers.placement == "colocated":
        return Finding(name, Verdict.OK, "all of the servers' node" if elsewhere else "the trainer's, as colocated")
    verdict = Verdict.WARN if servers.memory_share <= SHARED else Verdict.FAIL
    way_out = f"name GPUs of their own in {key}.devices, and {key}.memory_share if they are to be shared"
    return Finding(name, verdict, "not set: the trainer's", "others than the trainer's", way_out)


def _devices(key: str, servers: ServersConfig, ids: Sequence[str], whole: int, taken: Mapping[str, str]) -> Finding:
    name, said = f"gpus: {key}.devices", ",".join(ids)
    if not all(one.isdigit() for one in ids):
        return Finding(name, Verdict.SKIPPED, f"{said}: no numbers")
    bound = f"of 0 to {whole - 1}, each once"
    if any(int(one) >= whole for one in ids) or len(set(ids)) < len(ids):
        return Finding(name, Verdict.FAIL, said, bound, f"correct {key}.devices")
    if servers.placement == "colocated":
        own = all(taken.get(one) == "the trainer" for one in ids)
        way_out = "" if own else f"name the GPUs of the trainer's processes, or leave {key}.devices out"
        return Finding(name, Verdict.OK if own else Verdict.FAIL, said, "the trainer's, as colocated", way_out)
    clash = {one: taken[one] for one in ids if one in taken}
    if not clash:
        return Finding(name, Verdict.OK, said, bound)
    verdict = Verdict.WARN if servers.memory_share <= SHARED else Verdict.FAIL
    who = ", ".join(f"{one} ({owner})" for one, owner in clash.items())
    way_out = f"name others in {key}.devices, or start fewer processes (train.processes)"
    return Finding(name, verdict, f"in use: {who}", "GPUs of their own", way_out)


def main() -> int:
    """Print what torch sees here."""
    import torch  # late: it takes seconds

    found = []
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        found.append(Gpu(torch.cuda.get_device_name(number), free, total))
    sys.stdout.write(json.dumps([asdict(gpu) for gpu in found]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
