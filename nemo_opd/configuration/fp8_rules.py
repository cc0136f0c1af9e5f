"""Rules about FP8: sizes that its matrix products cannot take, and what Megatron refuses, said before a model loads."""

from __future__ import annotations

from nemo_opd.config import FP8_MULTIPLES, Config, FidelityConfig, FP8Config, LayoutConfig, TeacherConfig
from nemo_opd.configuration.model_files import ModelSizes
from nemo_opd.errors import ConfigError


def fp8_rules(key: str, config: Config, model: LayoutConfig, sizes: ModelSizes) -> None:
    """Raises ConfigError for what cannot work of ``{key}.fp8``.

    Whether the chip knows the recipe is asked where the model is built: this machine may be another one.
    """
    fp8 = model.fp8
    if isinstance(model, TeacherConfig):
        _teacher(key, model)
    if fp8.recipe == "none":
        _nothing_else(key, fp8)
        return
    if config.student.dtype != "bfloat16" if model is config.student else getattr(model, "dtype", "") != "bfloat16":
        got = f"{fp8.recipe} beside {key}.dtype={getattr(model, 'dtype', None)}"
        raise ConfigError(f"{key}.fp8.recipe", got, "bfloat16 beside FP8", f"set {key}.dtype=bfloat16")
    if sizes.experts:
        expected = "none for a mixture of experts: how many tokens an expert gets is no multiple of what FP8 wants"
        raise ConfigError(f"{key}.fp8.recipe", fp8.recipe, expected, "leave it out")
    _layers(key, fp8, sizes.layers // model.pipeline_model_parallel_size)
    _shapes(key, fp8.recipe, model.tensor_model_parallel_size, sizes)
    if fp8.param_gather and (model is not config.student or config.optimizer.distributed is False):
        expected = "false but for a student with the distributed optimizer, which gathers weights"
        raise ConfigError(f"{key}.fp8.param_gather", True, expected, "leave it out")
    if fp8.param_gather and fp8.recipe == "mxfp8":
        # Megatron gathers these through the gradients' buffer (reuse_grad_buf_for_mxfp8_param_ag): not built here.
        expected = "false with recipe mxfp8, whose weights Megatron gathers through the gradients' buffer"
        raise ConfigError(f"{key}.fp8.param_gather", True, expected, "leave it out, or choose another recipe")


def _nothing_else(key: str, fp8: FP8Config) -> None:
    if fp8 != FP8Config():
        way_out = f"set {key}.fp8.recipe (blockwise on Hopper), or leave the rest of {key}.fp8 out"
        raise ConfigError(f"{key}.fp8", "settings without a recipe", "a recipe", way_out)


def _teacher(key: str, teacher: TeacherConfig) -> None:
    if teacher.fp8.recipe != "none" and teacher.engine != "megatron":
        expected = f"none with {key}.engine={teacher.engine}"
        way_out = f"set {key}.engine=megatron"
        way_out += f", or {key}.servers.quantization=fp8" if teacher.engine == "vllm" else ", or leave it out"
        raise ConfigError(f"{key}.fp8.recipe", teacher.fp8.recipe, expected, way_out)
    gated = teacher.fp8.recipe != "none" and teacher.source == "external"
    if teacher.fidelity != FidelityConfig() and not gated:
        expected = f"nothing without {key}.fp8.recipe of an external teacher, for whose FP8 it is"
        raise ConfigError(f"{key}.fidelity", "settings", expected, "leave it out, or set the recipe")


def _layers(key: str, fp8: FP8Config, per_stage: int) -> None:
    for end, count in zip(("start", "end"), fp8.bf16_layers(), strict=True):
        name = f"{key}.fp8.bf16_layers_at_{end}"
        if fp8.recipe == "delayed" and count:
            expected = "0 with recipe delayed, which Megatron runs in all layers or none"
            raise ConfigError(name, count, expected, "leave it out, or choose another recipe")
        if count > per_stage:
            way_out = "choose fewer, or fewer pipeline stages"
            raise ConfigError(name, count, f"at most the {per_stage} layers of a pipeline stage", way_out)


def _shapes(key: str, recipe: str, tensor_parallel: int, sizes: ModelSizes) -> None:
    """Every side of every matrix that a process holds."""
    multiple = FP8_MULTIPLES[recipe]
    heads = sizes.attention_heads // tensor_parallel
    groups = max(1, sizes.key_value_heads // tensor_parallel)
    sides = {
        "hidden size": sizes.hidden,
        "query, key and value rows of a process": (heads + 2 * groups) * sizes.head_dim,
        "attention output of a process": heads * sizes.head_dim,
        "feed-forward size of a process": sizes.feed_forward // tensor_parallel,
    }
    for name, size in sides.items():
        if size % multiple:
            expected = f"a multiple of {multiple}, as recipe {recipe} wants it"
            way_out = f"choose another recipe or {key}.tensor_model_parallel_size, or leave FP8 out"
            raise ConfigError(f"{key}.fp8.recipe", f"{recipe} with a {name} of {size}", expected, way_out)
