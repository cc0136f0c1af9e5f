"""Rules between a recipe and the sizes of its models: what does not divide, or does not fit, is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from nemo_opd.config import Config, LayoutConfig, TeacherConfig
from nemo_opd.configuration.fp8_rules import fp8_rules
from nemo_opd.configuration.model_files import ModelSizes
from nemo_opd.errors import ConfigError


class SizesReader(Protocol):
    """What `read_model_sizes` is."""

    def __call__(self, key: str, folder: Path, *, convertible: bool) -> ModelSizes: ...


def check_models(config: Config, read_sizes: SizesReader) -> None:
    """Refuse what the models' sizes do not allow; `read_sizes` is `read_model_sizes` or does what it does with models
    that are not here. Raises ConfigError."""
    student = read_sizes("student.model", Path(config.student.model), convertible=True)
    _layout("student", config.student, student)
    fp8_rules("student", config, config.student, student)
    _vocabulary(config, student)
    models = {"student": student}
    for key, teacher in config.every_teacher().items():
        if teacher.engine != "none":
            own = teacher.source != "external"
            models[key] = student if own else _scoring_model(key, "model", teacher, student, read_sizes)
            fp8_rules(key, config, teacher, models[key])
        if teacher.base_model is not None:
            base = "base" if key == "teacher" else f"base of {key}"
            models[base] = _scoring_model(key, "base_model", teacher, student, read_sizes)
    _lengths(config, models)


def _scoring_model(
    key: str, name: str, teacher: TeacherConfig, student: ModelSizes, read_sizes: SizesReader
) -> ModelSizes:
    """Of a teacher or its base: read, found to fit the layout and to know every token of the student."""
    megatron = teacher.engine == "megatron"
    sizes = read_sizes(f"{key}.{name}", Path(str(getattr(teacher, name))), convertible=megatron)
    if megatron:
        _layout(key, teacher, sizes)
    if sizes.vocabulary < student.vocabulary:
        got, expected = f"a vocabulary of {sizes.vocabulary}", f"at least the student's {student.vocabulary}"
        raise ConfigError(f"{key}.{name}", got, expected, "use a teacher that knows every token of the student")
    if teacher.servers.protocol == "openai" and sizes.vocabulary > student.vocabulary:
        expected = (
            f"own for a teacher of {sizes.vocabulary} ids and a student of {student.vocabulary}, as a stock server's "
            "probabilities are about all ids that its model knows"
        )
        way_out = "serve it with nemo_opd.engines.vllm.server (scored_ids), or leave urls out too"
        raise ConfigError(f"{key}.servers.protocol", "openai", expected, way_out)
    if teacher.engine == "vllm" and sizes.positions is not None:  # a server keeps one for a token that it would write
        return replace(sizes, positions=sizes.positions - 1)
    return sizes


def _layout(who: str, layout: LayoutConfig, model: ModelSizes) -> None:
    """Do the model's sizes divide? Key-value heads may be fewer than ranks: Megatron then cuts them."""
    tensor, pipeline = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    groups = model.key_value_heads
    cut = model.attention_heads if model.experts else math.gcd(model.attention_heads, model.feed_forward)
    fitting = [size for size in _divisors(cut) if groups % size == 0 or size % groups == 0]
    if tensor not in fitting:
        width = "" if model.experts else f" and a feed-forward width of {model.feed_forward}"
        expected = (
            f"{_alternatives(fitting)} ({model.attention_heads} attention heads{width} divide by these, and {groups} "
            "key-value heads divide by them or divide them)"
        )
        raise ConfigError(f"{who}.tensor_model_parallel_size", tensor, expected, "set it to one of these")
    if model.layers % pipeline:
        expected = f"{_alternatives(_divisors(model.layers))} (divisors of {model.layers} layers)"
        raise ConfigError(f"{who}.pipeline_model_parallel_size", pipeline, expected, "set it to one of these")
    _chunks(who, layout, model)
    _experts(who, layout, model)
    if layout.sequence_parallel and tensor == 1:
        way_out = f"leave it out, or raise {who}.tensor_model_parallel_size"
        raise ConfigError(f"{who}.sequence_parallel", True, "false with tensor_model_parallel_size 1", way_out)


def _chunks(who: str, layout: LayoutConfig, model: ModelSizes) -> None:
    pipeline, chunks = layout.pipeline_model_parallel_size, layout.chunks
    key, each = f"{who}.virtual_pipeline_model_parallel_size", model.layers // pipeline
    if pipeline == 1 and chunks > 1:
        way_out = f"leave it out, or raise {who}.pipeline_model_parallel_size"
        raise ConfigError(key, chunks, "1 with pipeline_model_parallel_size 1, as there are no stages", way_out)
    if each % chunks:
        expected = f"{_alternatives(_divisors(each))} (divisors of the {each} layers of a stage)"
        raise ConfigError(key, chunks, expected, "set it to one of these")


def _experts(who: str, layout: LayoutConfig, model: ModelSizes) -> None:
    over = layout.expert_model_parallel_size
    if over > 1 and not model.experts:
        expected = "1, as the model has no experts"
        raise ConfigError(f"{who}.expert_model_parallel_size", over, expected, "leave it out")
    if model.experts % over:
        expected = f"a divisor of the {model.experts} experts of a layer"
        raise ConfigError(f"{who}.expert_model_parallel_size", over, expected, "change it")
    if model.experts and layout.context_parallel_size > 1:
        expected = "1 for a mixture of experts, whose sequences are not cut"
        way_out = f"leave it out; raise {who}.tensor_model_parallel_size or pipeline_model_parallel_size instead"
        raise ConfigError(f"{who}.context_parallel_size", layout.context_parallel_size, expected, way_out)
    if model.experts and layout.tensor_model_parallel_size > 1 and not layout.sequence_parallel:
        expected = "true for a mixture of experts under tensor parallelism, whose ranks would each route every token"
        raise ConfigError(f"{who}.sequence_parallel", False, expected, "set it to true")


def _vocabulary(config: Config, model: ModelSizes) -> None:
    """Padding goes to the last shard; a shard of nothing but padding has no normaliser."""
    tensor, multiple = config.student.tensor_model_parallel_size, config.student.vocab_padding_multiple
    shard = math.ceil(model.vocabulary / (multiple * tensor)) * multiple
    if (tensor - 1) * shard >= model.vocabulary:
        expected = f"so small that each of {tensor} ranks holds some of the {model.vocabulary} vocabulary entries"
        raise ConfigError("student.vocab_padding_multiple", multiple, expected, "lower it (1 always works)")
    for slot, choice in (("loss", config.loss), ("stop", config.stop)):
        unread = getattr(choice, "divergence", "") == "full" or getattr(choice, "outlier", "forward_kl") != "forward_kl"
        k = 0 if unread else getattr(choice, "k", 0)
        if k > model.vocabulary:
            raise ConfigError(f"{slot}.k", k, f"at most the student's vocabulary of {model.vocabulary}", "lower it")


def _lengths(config: Config, models: Mapping[str, ModelSizes]) -> None:
    responses = {"rollout.max_new_tokens": (config.rollout.max_new_tokens, models)}
    if config.evaluate.path is not None and config.evaluate.max_new_tokens is not None:  # no teacher reads these
        responses["evaluate.max_new_tokens"] = (config.evaluate.max_new_tokens, {"student": models["student"]})
    for key, (new_tokens, readers) in responses.items():
        for who, model in readers.items():
            if model.positions is not None and config.data.max_prompt_tokens + new_tokens > model.positions:
                got = f"{new_tokens} after a prompt of up to {config.data.max_prompt_tokens}"
                expected = f"together at most the {model.positions} positions of the {who}"
                raise ConfigError(key, got, expected, "lower it or data.max_prompt_tokens")
    inserted = getattr(config.context, "max_tokens", 0)
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    for who, model in models.items():
        if inserted and who != "student" and longest + inserted > (model.positions or math.inf):
            got = f"{inserted} besides up to {longest} of prompt and response"
            expected = f"together at most the {model.positions} positions of the {who}"
            raise ConfigError("context.max_tokens", got, expected, "lower it")


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _alternatives(numbers: Sequence[int]) -> str:
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last
