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
    SIGNS,
    Config,
    DatasetPrefix,
    LayoutConfig,
)
from nemo_opd.configuration.context_rules import context_rules
from nemo_opd.configuration.model_files import read_model_sizes
from nemo_opd.configuration.model_rules import check_models
from nemo_opd.configuration.objective_rules import prefix_rules, weight_rules
from nemo_opd.configuration.reward_rules import reward_rules
from nemo_opd.configuration.server_rules import reachable_servers, server_rules
from nemo_opd.configuration.staleness_rules import staleness_rules
from nemo_opd.configuration.stop_rules import stop_rules
from nemo_opd.configuration.teacher_rules import teacher_rules
from nemo_opd.configuration.template_rules import template_rules
from nemo_opd.errors import ConfigError

CHOICES: dict[str, tuple[str, ...]] = {
    "student.dtype": ("bfloat16", "float32", "float64"),
    "teacher.dtype": ("bfloat16", "float32", "float64"),
    "teacher.engine": ("megatron", "hf", "vllm", "none"),
    "teacher.source": ("external", "current", "frozen", "ema"),
    "rollout.engine": ("hf", "vllm"),
    "rollout.servers.protocol": ("own", "openai"),
    "teacher.servers.protocol": ("own", "openai"),
    "rollout.servers.placement": ("separate", "colocated"),
    "rollout.servers.transport": ("disk", "nccl", "ipc", "gloo"),
    "rollout.dtype": ("bfloat16", "float32", "float64"),
    "data.on_malformed": ("error", "skip"),
    "verify.name": ("none", "exact", "integer", "math", "choice", "tool_call", "code"),
    "optimizer.decay": ("constant", "linear", "cosine"),
    "prefix.length": ("uniform", "largest"),
    "prefix.loss": ("cross_entropy", "same"),
    "context.variant": ("contrastive", "successes", "random_peer", "unrelated_prompt", "success_only_matched"),
    "context.place": ("user", "system"),
    "context.fallback": ("mask", "plain_prompt"),
    "stop.form": ("segments", "after"),
    "stop.divergence": ("tail", "full"),
    "stop.support": ("student", "teacher"),
    "loss.support": ("student", "teacher", "union", "intersection"),
    "loss.teacher": ("full", "scores"),
    "loss.divergence": ("reverse", "forward", "jsd"),
    "loss.importance_ratio": ("sampler", "none"),
    "loss.trust": ("sampled", "expected"),
    "loss.outside": ("tail", "renormalised"),
    "weight.of": ("student", "teacher"),
    "loss.outlier": ("forward_kl", "mask", "clip"),
    **{f"diagnose.{sign}.action": ("ignore", "warn", "stop") for sign in SIGNS},
    "reward.average": ("tokens", "responses"),
    "reward.equal_groups": ("keep", "drop", "redraw"),
}

RANGES: dict[str, tuple[float, float]] = {
    "run.seed": (0, 2**63 - 1),
    "student.tensor_model_parallel_size": (1, math.inf),
    "student.pipeline_model_parallel_size": (1, math.inf),
    "student.expert_model_parallel_size": (1, math.inf),
    "student.vocab_padding_multiple": (1, math.inf),
    "teacher.tensor_model_parallel_size": (1, math.inf),
    "teacher.pipeline_model_parallel_size": (1, math.inf),
    "teacher.expert_model_parallel_size": (1, math.inf),
    "teacher.micro_batch_tokens": (1, math.inf),
    "teacher.decay": (0, 1),
    "teacher.weight": (1e-9, math.inf),
    "data.max_prompt_tokens": (1, math.inf),
    "rollout.samples_per_prompt": (1, math.inf),
    "rollout.max_new_tokens": (1, math.inf),
    "rollout.temperature": (1e-3, 100),
    "rollout.top_p": (1e-6, 1),
    "rollout.top_k": (0, math.inf),
    "rollout.batch_size": (1, math.inf),
    "rollout.refit_every": (1, math.inf),
    "rollout.staleness": (0, 64),
    **{
        f"{section}.servers.{name}": bounds
        for section in ("rollout", "teacher")
        for name, bounds in {
            "count": (1, 4096),
            "restarts": (0, math.inf),
            "tensor_parallel_size": (1, 64),
            "memory_share": (0.01, 1.0),
            "cpu_cache_gib": (1, math.inf),
            "start_seconds": (1, math.inf),
            "load_seconds": (1, math.inf),
            "stuck_seconds": (1, math.inf),
        }.items()
    },
    "stop.window": (1, math.inf),
    "stop.consecutive": (1, math.inf),
    "stop.threshold_quantile": (0, 1),
    "stop.history": (1, math.inf),
    "stop.warmup_samples": (0, math.inf),
    "stop.warmup_steps": (0, math.inf),
    "stop.grace": (0, math.inf),
    "stop.stride": (1, math.inf),
    "stop.k": (1, math.inf),
    "stop.segment_tokens": (1, math.inf),
    "stop.length": (1, math.inf),
    "stop.tolerance": (0, 1),
    "prefix.max_tokens": (1, math.inf),
    "prefix.anneal_steps": (1, math.inf),
    "prefix.loss_weight": (0, math.inf),
    "prefix.on_policy_share": (0, 1),
    "prefix.teacher_share": (0, 1 - 1e-6),
    "context.max_tokens": (1, math.inf),
    "context.success_threshold": (1e-6, 1),
    "context.successes": (1, math.inf),
    "context.failures": (1, math.inf),
    "loss.clip_ratio": (1e-6, 1 - 1e-6),
    "loss.advantage_clip": (1e-6, math.inf),
    "loss.advantage_floor": (1e-6, 1 - 1e-6),
    "loss.discount": (0, 1),
    "loss.k": (1, math.inf),
    "loss.beta": (0, 1),
    "loss.alpha": (1e-6, 1 - 1e-6),
    "loss.outlier_clip": (1e-6, math.inf),
    "loss.entropy_threshold": (0, math.inf),
    "loss.extrapolation": (1e-6, math.inf),
    "loss.low_entropy": (0, math.inf),
    "reward.weight": (1e-9, math.inf),
    "reward.loss_weight": (1e-9, math.inf),
    "reward.clip_low": (1e-6, 1),
    "reward.clip_high": (1e-6, math.inf),
    "reward.std_eps": (0, math.inf),
    "reward.redraws": (1, math.inf),
    "weight.clamp": (1e-6, math.inf),
    "weight.low": (0, math.inf),
    "weight.high": (1e-6, math.inf),
    "weight.gamma": (0, math.inf),
    "weight.keep": (1e-6, 1),
    "verify.time_limit": (1e-3, math.inf),
    "optimizer.lr": (0, math.inf),
    "optimizer.min_lr": (0, math.inf),
    "optimizer.warmup_steps": (0, math.inf),
    "optimizer.weight_decay": (0, math.inf),
    "optimizer.adam_beta1": (0, 1 - 1e-9),
    "optimizer.adam_beta2": (0, 1 - 1e-9),
    "optimizer.adam_eps": (1e-30, 1),
    "optimizer.clip_grad": (0, math.inf),
    "train.steps": (1, math.inf),
    "train.prompts_per_step": (1, math.inf),
    "train.micro_batch_tokens": (1, math.inf),
    "train.loss_chunk_tokens": (1, math.inf),
    "train.processes": (1, math.inf),
    "checkpoint.every": (1, math.inf),
    "checkpoint.keep": (1, math.inf),
    "evaluate.every": (0, math.inf),
    "evaluate.problems": (1, math.inf),
    "evaluate.samples_per_prompt": (1, math.inf),
    "evaluate.temperature": (1e-3, 100),
    "evaluate.top_p": (1e-6, 1),
    "evaluate.max_new_tokens": (1, math.inf),
    "observe.rollouts_per_step": (0, math.inf),
    "observe.token_scores": (0, math.inf),
    "diagnose.window": (2, math.inf),
    "diagnose.start_steps": (2, math.inf),
    "diagnose.warmup_steps": (0, math.inf),
    "diagnose.repeat_every": (1, math.inf),
    **{f"diagnose.{sign}.threshold": (1e-6, 1) for sign in SIGNS},
    **{f"diagnose.{sign}.threshold": (1, math.inf) for sign in ("length_inflation", "divergence")},
}
"""Inclusive bounds. Here and in CHOICES a key that the chosen slots do not have, or that is null, is passed over."""


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
        staleness_rules,
        template_rules,
        context_rules,
        reward_rules,
        _served_scores,
        weight_rules,
        _schedule,
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
        expected = f"a multiple of {smallest} (tensor x pipeline parallel: {layouts})"
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
    """Processes that hold one copy of the model."""
    return layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size


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
    if config.optimizer.distributed and importlib.util.find_spec("transformer_engine") is None:
        expected = "false or null, as Transformer Engine is not installed and a resume needs its Adam"
        raise ConfigError("optimizer.distributed", True, expected, "leave it out")


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
