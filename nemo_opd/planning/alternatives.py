"""Other layouts of the same recipe: the smallest change with which it fits, and the best few of all that fit."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from nemo_opd.config import Config, LayoutConfig
from nemo_opd.configuration.cluster_rules import server_nodes
from nemo_opd.configuration.model_rules import SizesReader, check_models
from nemo_opd.errors import ConfigError
from nemo_opd.planning.catalogue import read_sizes
from nemo_opd.planning.plan import Options, Plan, make_setting, placed, plan
from nemo_opd.planning.setting import Setting

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
    """The fastest layouts that fit, of every way to cut the student, and one external teacher besides."""
    here = make_setting(config, options)
    sizes = functools.cache(read_sizes)  # of models that stay the same
    cuts = [list(_permitted(config, key, changes, sizes)) for key, changes in _layouts(config, here).items()]
    found = []
    for chosen in product(*cuts):
        sections: dict[str, Any] = {cut.key: cut.layout for cut in chosen}
        different = replace(config, **sections)
        try:
            tried = plan(placed(replace(here, config=different), options.nodes))
        except ConfigError:  # processes that the layouts do not divide
            continue
        if not tried.problems:
            found.append((chosen, tried))
    fastest = sorted(found, key=lambda one: _cost(one[1]))[:best]
    return [
        Alternative(tuple(word for cut in chosen for word in _words(config, cut.change)), tried)
        for chosen, tried in fastest
    ]


@dataclass(frozen=True)
class _Cut:
    """One way to cut one model."""

    key: str
    change: Change
    layout: LayoutConfig
    """The section with the change."""


def _cost(found: Plan) -> tuple[float, float]:
    """Where writing hides all the rest, the layout with the least of the rest."""
    parts = found.times.parts
    return found.times.step, sum(parts.values()) - parts["write"] - parts["loss"]


def _tried(config: Config, options: Options, change: Change) -> Alternative | None:
    """The plan with the change, if it can be and fits."""
    different = _changed(config, change)
    try:
        check_models(different, read_sizes)
        found = plan(make_setting(different, options))
    except ConfigError:
        return None
    return None if found.problems else Alternative(_words(config, change), found)


def _changed(config: Config, change: Change) -> Config:
    """Another recipe with these settings; the rest of it is the same objects."""
    changed: Config = functools.reduce(lambda holder, one: _with(holder, one[0].split("."), one[1]), change, config)
    return changed


def _with(holder: Any, path: Sequence[str], value: object) -> Any:
    """A copy with another value at the end of the path."""
    name, *rest = path
    if rest:
        value = _with(_at(holder, name), rest, value)
    return {**holder, name: value} if isinstance(holder, dict) else replace(holder, **{name: value})


def _at(holder: Any, name: str) -> Any:
    return holder[name] if isinstance(holder, dict) else getattr(holder, name)


def _words(config: Config, change: Change) -> tuple[str, ...]:
    """What of it differs, as on the command line."""
    found = []
    for key, value in change:
        if functools.reduce(_at, key.split("."), config) != value:
            found.append(f"{key}={str(value).lower() if isinstance(value, bool) else value}")
    return tuple(found)


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
            for larger in _doubled(teacher.context_parallel_size, CONTEXT):
                yield ((f"{key}.context_parallel_size", larger),)
    for larger in _doubled(student.pipeline_model_parallel_size, PIPELINE):
        yield (("student.pipeline_model_parallel_size", larger),)
    for larger in _doubled(student.context_parallel_size, CONTEXT):
        yield (("student.context_parallel_size", larger),)


def _doubled(size: int, sizes: Sequence[int]) -> list[int]:
    return [larger for larger in sizes if larger > size]


def _layouts(config: Config, setting: Setting) -> dict[str, Iterator[Change]]:
    """Every way to cut the student, and one external teacher; experts and sequences are never cut together."""
    student, teacher = config.student, config.teacher
    expert = EXPERT if setting.shapes["student"].experts else (1,)
    found = {"student": _cuts("student", expert, student.virtual_pipeline_model_parallel_size)}
    if not config.teachers and teacher.engine == "megatron" and teacher.source == "external":
        found["teacher"] = _cuts("teacher", (teacher.expert_model_parallel_size,), None)
    return found


def _cuts(key: str, expert: Sequence[int], chunks: int | None) -> Iterator[Change]:
    """`chunks`: of each stage, where there are stages."""
    for tp, cp, pp, ep in product(TENSOR, CONTEXT, PIPELINE, expert):
        yield (
            (f"{key}.tensor_model_parallel_size", tp),
            (f"{key}.context_parallel_size", cp),
            (f"{key}.pipeline_model_parallel_size", pp),
            (f"{key}.virtual_pipeline_model_parallel_size", chunks if pp > 1 else chunks and 1),
            (f"{key}.sequence_parallel", tp > 1),
            (f"{key}.expert_model_parallel_size", ep),
        )


def _permitted(config: Config, key: str, changes: Iterable[Change], sizes: SizesReader) -> Iterator[_Cut]:
    """Those that the models' sizes permit."""
    for change in changes:
        different = _changed(config, change)
        try:
            check_models(different, sizes)
        except ConfigError:
            continue
        yield _Cut(key, change, _at(different, key))
