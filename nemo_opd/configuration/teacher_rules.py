"""Rules about the teacher, or about each of several: one that is missing or superfluous is refused."""

from __future__ import annotations

from dataclasses import fields
from operator import attrgetter

from nemo_opd.config import Config, LayoutConfig, SamePromptContext, TeacherConfig
from nemo_opd.errors import ConfigError

MIXABLE = ("reverse_kl", "policy_gradient", "k2")
"""Losses whose gradient against a mixture is the weighted sum of their gradients against each teacher."""

_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
)


def teacher_rules(config: Config) -> None:
    """Raises ConfigError for a teacher that is missing, superfluous, or cannot be what it is asked to be."""
    loss = config.loss
    if config.teachers:
        _several(config)
    elif config.data.teacher_key is not None:
        way_out = "name the teachers (teachers.math.model=..., teachers.code.model=...), or leave it out"
        raise ConfigError("data.teacher_key", config.data.teacher_key, "null without several teachers", way_out)
    elif loss.needs_teacher and config.teacher.engine == "none":
        way_out = "set teacher.engine=megatron and teacher.model, or choose loss=cross_entropy"
        raise ConfigError("teacher.engine", "none", f"an engine, as loss {loss.name} compares with a teacher", way_out)
    elif not loss.needs_teacher and config.teacher.engine != "none":
        way_out = "set teacher.engine=none, or choose a loss that learns from the teacher"
        expected = f"none, as loss {loss.name} asks no teacher"
        raise ConfigError("teacher.engine", config.teacher.engine, expected, way_out)
    for key, teacher in config.every_teacher().items():
        _one(config, key, teacher)


def _one(config: Config, key: str, teacher: TeacherConfig) -> None:
    if teacher.source != "external":
        _self(config, key, teacher)
    elif teacher.engine != "none" and teacher.model is None:
        way_out = f"set {key}.model (or {key}.source=ema)"
        if key == "teacher":
            way_out += ", or teacher.engine=none with loss=cross_entropy"
        raise ConfigError(f"{key}.model", "nothing", "a model folder", way_out)
    if teacher.source == "external" and (got := teacher.chunks) > 1:
        expected = "1, as forward passes alone fill a pipeline well: only the student's stages are interleaved"
        raise ConfigError(f"{key}.virtual_pipeline_model_parallel_size", got, expected, "leave it out")
    if teacher.engine in ("hf", "vllm"):
        why = "1, as the hf engine does not split" if teacher.engine == "hf" else "1, as it is on servers of its own"
        for name in _SIZES:
            if (got := attrgetter(name)(teacher)) > 1:
                way_out = f"set all sizes to 1, or {key}.engine=megatron"
                if teacher.engine == "vllm":
                    way_out = f"set all sizes to 1; {key}.servers.tensor_parallel_size splits a server's model"
                raise ConfigError(f"{key}.{name}", got, why, way_out)


def _self(config: Config, key: str, teacher: TeacherConfig) -> None:
    """The student as its own teacher has the student's model and layout; what says otherwise is refused."""
    source = f"{key}.source={teacher.source}"
    if teacher.engine == "none":
        expected = f"external, as loss {config.loss.name} asks no teacher"
        raise ConfigError(f"{key}.source", teacher.source, expected, "leave it out, or choose a loss with a teacher")
    if teacher.engine != "megatron":
        expected = f"megatron, where the student's weights are that {source} scores with"
        raise ConfigError(f"{key}.engine", teacher.engine, expected, f"leave it out, or set {key}.source=external")
    if teacher.model is not None:
        expected = f"nothing with {source}, as the teacher is the student itself"
        raise ConfigError(f"{key}.model", teacher.model, expected, f"leave it out, or set {key}.source=external")
    for size in fields(LayoutConfig):
        name, got, own = size.name, getattr(teacher, size.name), getattr(config.student, size.name)
        if got not in (getattr(LayoutConfig(), name), own):
            expected = f"the student's {own} with {source}, which lives on the student's layout"
            raise ConfigError(f"{key}.{name}", got, expected, "leave it out")


def _several(config: Config) -> None:
    names = ", ".join(config.teachers)
    plain = TeacherConfig()
    for field in fields(TeacherConfig):
        if (got := getattr(config.teacher, field.name)) != getattr(plain, field.name):
            expected = f"nothing beside teachers {names}, each of which has its own settings"
            raise ConfigError(
                f"teacher.{field.name}", got, expected, "say it of the one that is meant, or leave it out"
            )
    if not config.loss.needs_teacher:
        expected = f"none, as loss {config.loss.name} asks no teacher"
        raise ConfigError("teachers", names, expected, "leave them out, or choose a loss that learns from a teacher")
    for name, teacher in config.teachers.items():
        if teacher.engine == "none":
            raise ConfigError(
                f"teachers.{name}.engine", "none", "megatron, hf or vllm", f"leave teachers.{name} out instead"
            )
    averages = [name for name, teacher in config.teachers.items() if teacher.source == "ema"]
    if len(averages) > 1:
        key = f"teachers.{averages[1]}.source"
        raise ConfigError(key, "ema, a second one", "one average of the student at most", "choose another source")
    if config.data.teacher_key is None and len(config.teachers) > 1:
        _mixture(config)


def _mixture(config: Config) -> None:
    """All teachers score everything, and their reverse KLs are added up with weights."""
    loss, way_out = config.loss.name, "set data.teacher_key to a field that names each record's teacher, or change this"
    if loss not in MIXABLE:
        expected = f"one of {', '.join(MIXABLE)} for a mixture of teachers, whose gradients are the weighted sums"
        raise ConfigError("loss.name", loss, expected, way_out)
    if not isinstance(config.context, SamePromptContext):
        expected = "same_prompt for a mixture of teachers, each of which would want it in its own words"
        raise ConfigError("context.name", config.context.name, expected, way_out)
    for name, teacher in config.teachers.items():
        if loss == "reverse_kl" and teacher.source in ("current", "ema"):
            expected = (
                f"external or frozen for a mixture under loss {loss}, which keeps one output layer of all teachers"
            )
            raise ConfigError(
                f"teachers.{name}.source", teacher.source, expected, f"{way_out}, or loss=policy_gradient"
            )
