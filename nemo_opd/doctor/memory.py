"""Does the largest rank fit into the GPU's memory, and a server into its share? As `nemo-opd plan` calculates it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

from nemo_opd.config import Config
from nemo_opd.configuration.check import world_size
from nemo_opd.doctor.finding import Finding, Verdict, at_most
from nemo_opd.doctor.gpus import VISIBLE, Gpu, Look, look
from nemo_opd.doctor.slurm import all_processes
from nemo_opd.errors import ConfigError
from nemo_opd.planning.alternatives import suggestion
from nemo_opd.planning.gpus import GIB, GPUS
from nemo_opd.planning.memory import ServerMemory
from nemo_opd.planning.plan import Options, Plan, make_setting, plan

BETTER = 0.9
"""Of the memory: a plan is about so good."""
_AS_NAMED = 0.97
"""With so much of the memory that plan knows a GPU by, what plan suggests fits there too."""


def memory_findings(
    config: Config, gpu: str | None = None, environment: Mapping[str, str] = os.environ, look: Look = look
) -> list[Finding]:
    """Of the GPU that the command line names, else of the smallest that is here.

    Args:
        gpu: a name of `nemo_opd.planning.gpus.GPUS`; None: look here.
    """
    seen: tuple[Gpu, ...] = ()
    if gpu is None:
        try:
            seen = look(environment.get(VISIBLE))
        except RuntimeError:  # the check of GPUs says so
            return [Finding("memory", Verdict.SKIPPED, "torch does not say which GPU this is")]
        if not seen:
            return [Finding("memory", Verdict.SKIPPED, "no GPU here: say --gpu to compare with one")]
    smallest = min(seen, key=lambda one: one.total, default=None)
    options = Options(gpu or _nearest(smallest), gpus_per_node=len(seen) or Options.gpus_per_node)
    memory = float(smallest.total) if smallest else GPUS[options.gpu].memory
    try:
        processes = all_processes(config, environment)
        if processes != world_size(config, {}):  # a launcher or a job decides; else a change may need more of them
            config = replace(config, train=replace(config.train, processes=processes))
        found = planned(config, options, memory)
    except ConfigError as error:  # models that plan does not know run all the same
        return [Finding("memory", Verdict.SKIPPED, f"not planned: {error.key} is {error.got}")]
    return [_rank(config, options, found), *(_server(one) for one in found.servers)]


def planned(config: Config, options: Options, memory: float) -> Plan:
    """The plan of a recipe on GPUs with so many bytes. Raises ConfigError."""
    setting = make_setting(config, options)
    cluster = replace(setting.cluster, gpu=replace(setting.cluster.gpu, memory=memory))
    return plan(replace(setting, cluster=cluster))


def _nearest(gpu: Gpu | None) -> str:
    """Of another GPU than those that plan knows only the memory is used, and that is its own."""
    named = gpu.name.lower() if gpu else ""
    return next((name for name in GPUS if name in named), Options.gpu)


def _rank(config: Config, options: Options, found: Plan) -> Finding:
    memory, (phase, needed) = found.setting.cluster.gpu.memory, found.worst.peak
    name = f"memory: ranks {found.worst.ranks} while {phase}, GiB"
    row = at_most(name, needed / GIB, memory / GIB, "", better=BETTER * memory / GIB)
    if row.verdict is Verdict.OK:
        return row
    known = memory >= _AS_NAMED * GPUS[options.gpu].memory
    smaller = suggestion(config, options) if row.verdict is Verdict.FAIL and known else None
    change = (
        f"for example {' '.join(smaller.words)}" if smaller and smaller.words else "see nemo-opd plan for what fits"
    )
    return replace(row, way_out=change)


def _server(one: ServerMemory) -> Finding:
    """Room for keys and values of at least one sequence of the longest kind."""
    name, bound = f"memory: {one.key}, longest sequences at a time", "at least 1"
    if one.problems:
        return Finding(name, Verdict.FAIL, one.sequences, bound, "; ".join(one.problems))
    return Finding(name, Verdict.OK, one.sequences, bound)
