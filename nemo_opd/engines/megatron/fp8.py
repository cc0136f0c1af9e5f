"""FP8 in Megatron's own terms, and the refusal of what this machine cannot compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nemo_opd.config import FP8_MULTIPLES, FP8_SINCE, FP8Config
from nemo_opd.errors import ConfigError


def transformer_fields(fp8: FP8Config) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig; none without a recipe."""
    if fp8.recipe == "none":
        return {}
    start, end = fp8.bf16_layers()
    fields = {
        "fp8": fp8.format,
        "fp8_recipe": fp8.recipe,
        "fp8_param": fp8.param_gather,
        "first_last_layers_bf16": bool(start or end),
        "num_layers_at_start_in_bf16": start,
        "num_layers_at_end_in_bf16": end,
    }
    if fp8.recipe == "delayed":
        fields |= {"fp8_amax_history_len": fp8.amax_history, "fp8_amax_compute_algo": "max"}
    return fields


def require(fp8: FP8Config, key: str, transformer_engine: bool) -> None:
    """Raises ConfigError where Transformer Engine, or the chip, does not know the recipe."""
    if fp8.recipe == "none":
        return
    if not transformer_engine:
        expected = "none without Transformer Engine on a GPU"
        raise ConfigError(f"{key}.fp8.recipe", fp8.recipe, expected, f"set {key}.fp8.recipe=none, or run it on one")
    _require_chip(fp8.recipe, key, torch.cuda.get_device_capability(), torch.cuda.get_device_name())


def _require_chip(recipe: str, key: str, capability: tuple[int, int], name: str) -> None:
    known = [other for other, since in FP8_SINCE.items() if capability >= since]
    if recipe not in known:
        got = f"{recipe} on {name} (compute capability {'.'.join(map(str, capability))})"
        since = ".".join(map(str, FP8_SINCE[recipe]))
        expected = f"{', '.join(known) or 'none'} on this chip, as {recipe} runs from {since} on"
        raise ConfigError(f"{key}.fp8.recipe", got, expected, "choose one of these, or another chip")


def row_multiple(config: Any) -> int:
    """Tokens of a process must be a multiple of this; `config` is a model's TransformerConfig."""
    return FP8_MULTIPLES[str(config.fp8_recipe)] if config.fp8 else 1


@contextmanager
def full_precision(model: Any) -> Iterator[None]:
    """The model computes in its weights' dtype meanwhile: Megatron asks its config anew in every forward pass."""
    config = model.config
    format_, config.fp8 = config.fp8, None
    try:
        yield
    finally:
        config.fp8 = format_
