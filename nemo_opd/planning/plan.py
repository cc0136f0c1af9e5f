"""The plan of a recipe: does it fit, what moves, how long does a step take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from nemo_opd.config import FP8_SINCE, Config, FP8Config
from nemo_opd.configuration.check import check_settings, model_parallel_size
from nemo_opd.configuration.load import load
from nemo_opd.configuration.model_rules import check_models
from nemo_opd.errors import ConfigError
from nemo_opd.planning.catalogue import model_shape, read_sizes
from nemo_opd.planning.gpus import GIB, GPUS, Assumptions, Cluster, Gpu
from nemo_opd.planning.memory import RankMemory, ServerMemory, host_memory, rank_memory, server_memory
from nemo_opd.planning.setting import Setting
from nemo_opd.planning.times import Times, times
from nemo_opd.planning.traffic import Flow, flows


@dataclass(frozen=True)
class Options:
    """What the command line says besides the recipe."""

    gpu: str = "h100"
    nodes: int | None = None
    """Of the trainer; None: what `train.processes` of the recipe needs."""
    gpus_per_node: int = 8
    assumptions: Assumptions = field(default_factory=Assumptions)


@dataclass(frozen=True)
class Plan:
    """All that is known of a recipe on a machine before it runs."""

    setting: Setting
    ranks: list[RankMemory]
    servers: list[ServerMemory]
    host: float
    """Bytes of a node's own memory."""
    flows: list[Flow]
    times: Times

    @property
    def worst(self) -> RankMemory:
        """The rank that needs most."""
        return max(self.ranks, key=lambda rank: rank.peak[1])

    @property
    def problems(self) -> list[str]:
        """Why it does not fit; empty where it does."""
        setting = self.setting
        gpu, worst = setting.cluster.gpu, self.worst
        found = [problem for server in self.servers for problem in server.problems]
        phase, needed = worst.peak
        if needed > gpu.memory:
            found.append(
                f"ranks {worst.ranks} need {needed / GIB:.1f} GiB while {phase}, and the {gpu.name} has "
                f"{gpu.memory / GIB:.1f}"
            )
        beside, each = setting.beside, setting.cluster.gpus_per_node
        first = min(setting.processes, each)
        if beside and first + beside > each:
            found.append(
                f"the first node has {each} GPUs, and {first} processes and servers on {beside} more want to stand "
                "on it"
            )
        for one in setting.servings:
            if one.nodes and one.node_gpus > each:
                found.append(f"{one.key}: {one.node_gpus} GPUs of servers on a node of {each}")
            if one.colocated and one.gpus > setting.processes:
                found.append(f"{one.key}: {one.gpus} GPUs of servers colocated with {setting.processes} processes")
        return found

    @property
    def warnings(self) -> list[str]:
        """GPUs of a job with nodes for servers that nobody uses."""
        setting, each = self.setting, self.setting.cluster.gpus_per_node
        found = []
        for one in setting.servings:
            if one.nodes and one.node_gpus < each:
                per_node, idle = one.servers // one.nodes, each - one.node_gpus
                more = f"; set {one.key}.count={each // one.tp}" if idle >= one.tp else ""
                found.append(
                    f"{one.key}: {per_node} of {one.tp} GPUs leave {idle} of a node's {each} without work{more}"
                )
        idle = -(setting.processes + setting.beside) % each
        if len(setting.job_nodes) > 1 and idle:
            found.append(
                f"train.processes: {setting.processes} leave {idle} of the trainer's GPUs without work; slurm/opd.sh "
                f"starts {each} on each node, or processes_per_node of slurm/env.sh"
            )
        return found


def read_recipe(recipe: Path, overrides: Sequence[str]) -> Config:
    """A recipe's settings, checked as far as that is possible without its models, its data and its machine.

    Raises:
        ConfigError: as `nemo_opd.configuration.load.load`.
    """

    def check(config: Config) -> None:
        check_settings(config)
        check_models(config, read_sizes)

    return load(recipe, overrides, rules=check)


def make_setting(config: Config, options: Options) -> Setting:
    """The recipe on the machine. Raises ConfigError for processes that the layouts do not divide, and for a recipe of
    FP8 that the GPU does not know."""
    shapes = {"student": model_shape("student.model", config.student.model)}
    for key, teacher in config.every_teacher().items():
        if teacher.engine == "none":
            continue
        own = teacher.source != "external"
        shapes[key] = shapes["student"] if own else model_shape(f"{key}.model", str(teacher.model))
        if teacher.base_model is not None:
            shapes[f"{key}.base_model"] = model_shape(f"{key}.base_model", teacher.base_model)
    cluster = Cluster(GPUS[options.gpu], options.nodes or 1, options.gpus_per_node, options.assumptions)
    for key, layout in {"student": config.student, **config.every_teacher()}.items():
        _chip_knows(key, layout.fp8, cluster.gpu)
    return placed(Setting(config, shapes, cluster, 1), options.nodes)


def _chip_knows(key: str, fp8: FP8Config, gpu: Gpu) -> None:
    """Raises ConfigError for a recipe of FP8 that Transformer Engine does not run on this GPU."""
    if fp8.recipe != "none" and gpu.capability < FP8_SINCE[fp8.recipe]:
        known = ", ".join(recipe for recipe, since in FP8_SINCE.items() if gpu.capability >= since)
        way_out = "choose one of these, or another --gpu"
        raise ConfigError(f"{key}.fp8.recipe", f"{fp8.recipe} on {gpu.name}", f"{known} on this GPU", way_out)


def placed(setting: Setting, nodes: int | None) -> Setting:
    """With its number of processes: those of the nodes (less the GPUs of servers beside them), or the recipe's."""
    config, each = setting.config, setting.cluster.gpus_per_node
    layouts = [config.student, *(t for t in config.every_teacher().values() if t.engine == "megatron")]
    smallest = math.lcm(*map(model_parallel_size, layouts))
    if nodes is not None:
        key, processes = "--nodes", nodes * each - setting.beside
    else:
        key, processes = "train.processes", config.train.processes or smallest
    if processes < 1 or processes % smallest:
        expected = f"a multiple of {smallest}, by the layouts of student and teachers"
        raise ConfigError(key, f"{processes} processes", expected, "change their number or the layouts")
    cluster = replace(setting.cluster, nodes=math.ceil(processes / each))
    return replace(setting, cluster=cluster, processes=processes)


def plan(setting: Setting) -> Plan:
    """Memory, messages and times."""
    moved = flows(setting)
    return Plan(
        setting=setting,
        ranks=rank_memory(setting),
        servers=[server_memory(setting, one) for one in setting.servings],
        host=host_memory(setting),
        flows=moved,
        times=times(setting, moved),
    )
