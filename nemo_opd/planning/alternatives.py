"""Other layouts of the same recipe: the smallest change with which it fits, and the best few of all that fit."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from operator import attrgetter

from nemo_opd.config import Config
from nemo_opd.configuration.cluster_rules import server_nodes
from nemo_opd.configuration.model_rules import check_models
from nemo_opd.errors import ConfigError
from nemo_opd.planning.catalogue import read_sizes
from nemo_opd.planning.plan import Options, Plan, make_setting, plan

TENSOR = (1, 2, 4, 8)
PIPELINE = (1, 2, 4, 8)
CONTEXT = (1, 2, 4, 8)
EXPERT = (1, 2, 4, 8, 16, 32)
_LEAST_SHARE = 0.3
_SMALLEST_CHUNK = 128

Change = tuple[tuple[str, object], ...]
"""Settings by dotted key, with their new values."""


@dataclass(frozen=True)
class Alternative:
    """A plan that fits, and how it differs from the recipe."""

    words: tuple[str, ...]
    """As on the command line: ``student.tensor_model_parallel_size=2``, ``--nodes 4``."""
    plan: Plan


def suggestion(config: Config, options: Options) -> Alternative | None:
    """The first of some changes, the least first, with which the recipe fits: one setting, two, or more nodes."""
    single = [*_fewer_servers(config, options.gpus_per_node), *_single_changes(config)]
    pairs = [(*a, *b) for i, a in enumerate(single) for b in single[i + 1 :] if a[0][0] != b[0][0]]
    for change in [*single, *pairs]:
        found = _tried(config, options, change)
        if found is not None:
            return found
    nodes = options.nodes or make_setting(config, options).cluster.nodes
    for factor in (2, 4, 8):
        larger = Options(options.gpu, nodes * factor, options.gpus_per_node, options.assumptions)
        for change in [(), *single]:
            found = _tried(config, larger, change)
            if found is not None:
                return Alternative((f"--nodes {nodes * factor}", *found.words), found.plan)
    return None


def sweep(config: Config, options: Options, best: int) -> list[Alternative]:
    """The fastest layouts that fit, one for each way of cutting student and teacher."""
    found = []
    experts = make_setting(config, options).shapes["student"].experts
    for change in _layouts(config, EXPERT if experts else (1,)):
        tried = _tried(config, options, change)
        if tried is not None:
            found.append(tried)
    return sorted(found, key=_cost)[:best]


def _cost(one: Alternative) -> tuple[float, float]:
    """Where writing hides all the rest, the layout with the least of the rest."""
    parts = one.plan.times.parts
    return one.plan.times.step, sum(parts.values()) - parts["write"] - parts["loss"]


def _tried(config: Config, options: Options, change: Change) -> Alternative | None:
    """The plan with the change, if it can be and fits."""
    different = copy.deepcopy(config)
    words = []
    for key, value in change:
        section, _, name = key.rpartition(".")
        holder = different.every_teacher().get(section) or attrgetter(section)(different)
        if getattr(holder, name) != value:
            setattr(holder, name, value)
            words.append(f"{key}={str(value).lower() if isinstance(value, bool) else value}")
    try:
        check_models(different, read_sizes)
        found = plan(make_setting(different, options))
    except ConfigError:
        return None
    return None if found.problems else Alternative(tuple(words), found)


def _fewer_servers(config: Config, gpus: int) -> Iterator[Change]:
    """So many as a node of their own has GPUs for."""
    sections = {"rollout": config.rollout.servers, "teacher": config.teacher.servers}
    for key, servers in sections.items():
        fitting = gpus // servers.tensor_parallel_size
        if key in server_nodes(config) and 0 < fitting < servers.count:
            yield ((f"{key}.servers.count", fitting),)


def _single_changes(config: Config) -> Iterator[Change]:
    """From those that cost nothing to those that cost most."""
    student, train = config.student, config.train
    if student.tensor_model_parallel_size > 1 and not student.sequence_parallel:
        yield (("student.sequence_parallel", True),)
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    if train.micro_batch_tokens > longest:
        yield (("train.micro_batch_tokens", longest),)
    if student.recompute != "full":
        yield (("student.recompute", "full"),)
    if train.loss_chunk_tokens > _SMALLEST_CHUNK:
        yield (("train.loss_chunk_tokens", _SMALLEST_CHUNK),)
    share = round(config.rollout.servers.memory_share - 0.1, 2)
    if config.rollout.engine == "vllm" and share >= _LEAST_SHARE:
        yield (("rollout.servers.memory_share", share),)
    for larger in _doubled(student.tensor_model_parallel_size, TENSOR):
        yield (("student.tensor_model_parallel_size", larger), ("student.sequence_parallel", True))
    for key, teacher in config.every_teacher().items():
        if teacher.engine == "megatron" and teacher.source == "external":
            for larger in _doubled(teacher.tensor_model_parallel_size, TENSOR):
                yield ((f"{key}.tensor_model_parallel_size", larger),)
            for larger in _doubled(teacher.pipeline_model_parallel_size, PIPELINE):
                yield ((f"{key}.pipeline_model_parallel_size", larger),)
    for larger in _doubled(student.pipeline_model_parallel_size, PIPELINE):
        yield (("student.pipeline_model_parallel_size", larger),)
    for larger in _doubled(student.context_parallel_size, CONTEXT):
        yield (("student.context_parallel_size", larger),)


def _doubled(size: int, sizes: Sequence[int]) -> list[int]:
    return [larger for larger in sizes if larger > size]


def _layouts(config: Config, expert: Sequence[int]) -> Iterator[Change]:
    """Every way to cut the student, and one external teacher besides."""
    teacher = config.teacher
    cut = not config.teachers and teacher.engine == "megatron" and teacher.source == "external"
    teachers = list(product(TENSOR, PIPELINE)) if cut else [(0, 0)]
    for tp, pp, ep, (teacher_tp, teacher_pp) in product(TENSOR, PIPELINE, expert, teachers):
        change: list[tuple[str, object]] = [
            ("student.tensor_model_parallel_size", tp),
            ("student.pipeline_model_parallel_size", pp),
            ("student.sequence_parallel", tp > 1),
            ("student.expert_model_parallel_size", ep),
        ]
        if cut:
            change += [
                ("teacher.tensor_model_parallel_size", teacher_tp),
                ("teacher.pipeline_model_parallel_size", teacher_pp),
                ("teacher.sequence_parallel", teacher_tp > 1),
            ]
        yield tuple(change)
