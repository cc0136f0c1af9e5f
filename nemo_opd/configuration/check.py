"""Rules between the fields of a configuration: what cannot work is refused before anything starts.

The first broken rule is raised as a ConfigError. Data-parallel size need not divide `train.prompts_per_step`: rollouts
are spread by length, and a replica without any still takes part in the step.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from nemo_opd.config import (
    EXPORT_FOLDER,
    Config,
    DatasetPrefix,
    LayoutConfig,
)
from nemo_opd.configuration.bounds import CHOICES, RANGES
from nemo_opd.configuration.cluster_rules import cluster_rules
from nemo_opd.configuration.context_rules import context_rules
from nemo_opd.configuration.limit_rules import limit_rules
from nemo_opd.configuration.model_files import read_model_sizes
from nemo_opd.configuration.model_rules import check_models
from nemo_opd.configuration.objective_rules import prefix_rules, weight_rules
from nemo_opd.configuration.optimizer_rules import gather_rules
from nemo_opd.configuration.reward_rules import reward_rules
from nemo_opd.configuration.server_rules import reachable_servers, server_rules
from nemo_opd.configuration.staleness_rules import staleness_rules
from nemo_opd.configuration.stop_rules import stop_rules
from nemo_opd.configuration.teacher_rules import teacher_rules
from nemo_opd.configuration.template_rules import template_rules
from nemo_opd.errors import ConfigError

_Rule = TypeVar("_Rule")


def check(config: Config, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse what cannot work. Reads small files only; raises ConfigError."""
    check_settings(config)
    for rule in (reachable_servers, _optimizer_here, _run_folder, _data_files):
        rule(config)
    check_models(config, read_model_sizes)
    world_size(config, environment)


def check_settings(config: Config) -> None:
    """Refuse settings that do not go together on any machine. Raises ConfigError."""
    for rule in (
        _choices,
        _ranges,
        teacher_rules,
        _written_responses,
        stop_rules,
        prefix_rules,
        server_rules,
        cluster_rules,
        staleness_rules,
        limit_rules,
        template_rules,
        context_rules,
        reward_rules,
        _served_scores,
        weight_rules,
        _schedule,
        gather_rules,
        _evaluation,
    ):
        rule(config)


def world_size(config: Config, environment: Mapping[str, str] = os.environ) -> int:
    """Processes of the run: the launcher's, else `train.processes`, else the smallest number that fits all layouts."""
    sizes = {"student": model_parallel_size(config.student)}
    for who, teacher in config.every_teacher().items():
        if teacher.engine == "megatron" and teacher.source == "external":
            sizes[who] = model_parallel_size(teacher)
    smallest = math.lcm(*sizes.values())
    launched = launched_processes(environment)
    key, processes = ("WORLD_SIZE", launched) if launched else ("train.processes", config.train.processes or smallest)
    if processes % smallest:
        layouts = " and ".join(f"{size} of the {who}" for who, size in sizes.items())
        sections = (config.student, *config.every_teacher().values())
        cut = "tensor x context" if any(section.context_parallel_size > 1 for section in sections) else "tensor"
        spread = any(section.expert_model_parallel_size > 1 for section in sections)
        parallel = f"{cut}, expert and pipeline parallel" if spread else f"{cut} x pipeline parallel"
        expected = f"a multiple of {smallest} ({parallel}: {layouts})"
        raise ConfigError(key, processes, expected, "change the number of processes or the layouts")
    return processes


def launched_processes(environment: Mapping[str, str] = os.environ) -> int | None:
    """How many processes a launcher (torchrun, or srun with a rendezvous) started; None where there was none.

    A batch script has SLURM's variables too, so they count only together with MASTER_ADDR and MASTER_PORT.
    """
    if not {"MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        return None
    for rank, size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if rank in environment and environment.get(size, "").isdigit():
            return int(environment[size])
    return None


def model_parallel_size(layout: LayoutConfig) -> int:
    """Processes that hold one copy of the model; of a mixture of experts the least that its layout fits.

    A stage's ranks are shared out twice: for attention by tensor and context parallelism, for experts by expert
    parallelism.
    """
    attention = layout.tensor_model_parallel_size * layout.context_parallel_size
    stage = math.lcm(attention, layout.expert_model_parallel_size)
    return stage * layout.pipeline_model_parallel_size


def _choices(config: Config) -> None:
    for key, value, choices in _values(config, CHOICES):
        if value is not None and value not in choices:
            raise ConfigError(key, value, f"one of {', '.join(choices)}", "choose one of these")


def _ranges(config: Config) -> None:
    for key, value, (low, high) in _values(config, RANGES):
        if value is not None and not (low <= value <= high and math.isfinite(value)):
            expected = f"at least {low:g}" if high == math.inf else f"a value from {low:g} to {high:.12g}"
            raise ConfigError(key, value, expected, "change the value")


def _values(config: Config, rules: Mapping[str, _Rule]) -> Iterator[tuple[str, Any, _Rule]]:
    """(key, value, rule); what is said of `teacher` goes for each of several too."""
    for key, rule in rules.items():
        section, _, path = key.partition(".")
        holders = config.every_teacher() if section == "teacher" else {section: getattr(config, section)}
        for where, holder in holders.items():
            value: Any = holder
            for name in path.split("."):
                value = getattr(value, name, None)
            yield f"{where}.{path}", value, rule


def _written_responses(config: Config) -> None:
    """With `prefix: dataset` nothing is generated, so what only a generator can give is refused."""
    if not isinstance(config.prefix, DatasetPrefix):
        return
    if config.rollout.samples_per_prompt != 1:
        way_out = "set rollout.samples_per_prompt=1, or prefix=student to let the student write"
        got = config.rollout.samples_per_prompt
        raise ConfigError("rollout.samples_per_prompt", got, "1, as the data set has one response per prompt", way_out)
    for slot, choice in (("loss", config.loss), ("reward", config.reward), ("weight", config.weight)):
        if choice.needs_sampler_logprobs:
            way_out = "choose prefix=student, or do without an importance ratio (loss=reverse_kl, weight=unit)"
            expected = (
                f"a {slot} that does not ask how probable a token was when it was drawn, as the data set wrote it"
            )
            raise ConfigError(f"{slot}.name", choice.name, expected, way_out)


def _served_scores(config: Config) -> None:
    """Scores at given ids need the ids with the request, and nothing computes the student's best ones by then."""
    support = getattr(config.loss, "support", None)
    if getattr(config.loss, "teacher", "full") == "scores" and support in ("student", "union"):
        expected = (
            "teacher or intersection with loss.teacher=scores, as the teacher is asked before the student's k best ids "
            "are known"
        )
        raise ConfigError("loss.support", support, expected, "choose one of these, or loss.teacher=full")


def _schedule(config: Config) -> None:
    optimizer, steps = config.optimizer, config.train.steps
    if optimizer.min_lr > optimizer.lr:
        raise ConfigError("optimizer.min_lr", optimizer.min_lr, f"at most optimizer.lr ({optimizer.lr})", "lower it")
    if optimizer.warmup_steps > steps:
        way_out = "shorten the warm-up or train longer"
        raise ConfigError("optimizer.warmup_steps", optimizer.warmup_steps, f"at most train.steps ({steps})", way_out)


def _optimizer_here(config: Config) -> None:
    if importlib.util.find_spec("transformer_engine") is not None:
        return
    if config.optimizer.distributed:
        expected = "false or null, as Transformer Engine is not installed and a resume needs its Adam"
        raise ConfigError("optimizer.distributed", True, expected, "leave it out")
    if config.optimizer.overlap_param_gather:
        expected = "false, as the distributed optimizer needs Transformer Engine, which is not installed"
        raise ConfigError("optimizer.overlap_param_gather", True, expected, "leave it out")


def _evaluation(config: Config) -> None:
    evaluate = config.evaluate
    if evaluate.path is None:
        if evaluate.every:
            way_out = "set evaluate.path to held-out problems, or evaluate.every=0"
            raise ConfigError("evaluate.every", evaluate.every, "0 without evaluate.path", way_out)
        return
    if config.verify.name == "none":
        way_out = "set verify.name (exact, integer, math, ...), or leave evaluate.path out"
        raise ConfigError("verify.name", "none", "a verifier, as evaluate.path asks for rewards", way_out)
    if evaluate.greedy and evaluate.samples_per_prompt > 1:
        way_out = "set evaluate.samples_per_prompt=1 or evaluate.greedy=false"
        got = evaluate.samples_per_prompt
        raise ConfigError("evaluate.samples_per_prompt", got, "1, as greedy samples are all the same", way_out)


def _run_folder(config: Config) -> None:
    folder = Path(config.run.dir)
    if not config.run.dir or (folder.exists() and not folder.is_dir()):
        raise ConfigError("run.dir", config.run.dir or "an empty text", "a folder, made when absent", "choose another")
    model = (folder / EXPORT_FOLDER).resolve()
    for key, path in (("student.model", config.student.model), ("teacher.model", config.teacher.model)):
        if config.checkpoint.export_at_end and path is not None and Path(path).resolve() == model:
            way_out = "choose another run.dir, or set checkpoint.export_at_end=false"
            raise ConfigError(key, path, "a folder that this run does not write its own model to", way_out)
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(
            "run.dir", folder, f"a place to write ({nearest} is none)", "choose another or change its mode"
        )


def _data_files(config: Config) -> None:
    for key, text in (("data.path", config.data.path), ("evaluate.path", config.evaluate.path)):
        if text is None:
            continue
        path = Path(text)
        if not path.exists():
            raise ConfigError(
                key, f"no file {path}", "a .jsonl or .parquet file, or a saved data set", "check the path"
            )
        if not path.is_dir() and path.suffix not in (".jsonl", ".parquet"):
            raise ConfigError(key, path, "a name in .jsonl or .parquet, or a folder", "convert or rename the file")
