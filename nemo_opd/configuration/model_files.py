"""The few sizes of a model that its config.json tells, read without importing transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_opd.errors import ConfigError
from nemo_opd.foreign import names_code

SUPPORTED_ARCHITECTURES = (
    "Qwen3ForCausalLM",
    "Qwen2ForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen3MoeForCausalLM",
)
"""Models that can be converted between Hugging Face and Megatron."""

_WINDOW = 4096
"""Sliding window of a Mistral whose config.json leaves it out; null says that there is none."""


@dataclass(frozen=True)
class ModelSizes:
    """Counts from a model folder's config.json."""

    architecture: str
    layers: int
    hidden: int
    head_dim: int
    attention_heads: int
    key_value_heads: int
    feed_forward: int
    """Width; of a mixture of experts that of one expert."""
    vocabulary: int
    positions: int | None
    """Longest sequence that the model was made for, and no longer than a Mistral's sliding window: so far the engines
    that know no window compute the same. None where the file does not say."""
    experts: int = 0
    """Of a layer; 0 in a dense model."""


def read_model_sizes(key: str, folder: Path, *, convertible: bool) -> ModelSizes:
    """Read ``folder/config.json``.

    Args:
        key: the setting that names the folder, for the error.
        convertible: refuse architectures that Megatron is not given here.

    Raises:
        ConfigError: no such folder, no readable config.json, code in the folder, an unsupported architecture.
    """
    return sizes_of(key, str(folder / "config.json"), read_config(key, folder), convertible=convertible)


def sizes_of(key: str, where: str, values: dict[str, Any], *, convertible: bool) -> ModelSizes:
    """The sizes in a config.json that was found at `where`. Raises ConfigError as `read_model_sizes`."""
    if (field := names_code(values)) is not None:
        way_out = "no code of a model is ever run: convert it to a supported architecture first"
        raise ConfigError(key, f"{where} with code of its own ({field})", "weights and JSON only", way_out)
    architecture = (values.get("architectures") or ["none"])[0]
    if convertible and architecture not in SUPPORTED_ARCHITECTURES:
        expected = f"one of {', '.join(SUPPORTED_ARCHITECTURES)}"
        raise ConfigError(key, f"a model of architecture {architecture}", expected, "choose a model of these families")
    hidden, heads = (_count(key, where, values, name) for name in ("hidden_size", "num_attention_heads"))
    mixture = architecture == "Qwen3MoeForCausalLM"
    return ModelSizes(
        architecture=architecture,
        layers=_count(key, where, values, "num_hidden_layers"),
        hidden=hidden,
        head_dim=values.get("head_dim") or hidden // heads,
        attention_heads=heads,
        key_value_heads=_count(key, where, values, "num_key_value_heads", "num_attention_heads"),
        feed_forward=_count(key, where, values, "moe_intermediate_size" if mixture else "intermediate_size"),
        vocabulary=_count(key, where, values, "vocab_size"),
        positions=_positions(architecture, values),
        experts=_count(key, where, values, "num_experts", "num_local_experts") if mixture else 0,
    )


def _positions(architecture: str, values: dict[str, Any]) -> int | None:
    positions: int | None = values.get("max_position_embeddings")
    window: int | None = values.get("sliding_window", _WINDOW) if architecture == "MistralForCausalLM" else None
    return positions if window is None else min(window, positions or window)


def _count(key: str, where: str, values: dict[str, Any], name: str, otherwise: str = "") -> int:
    size = values.get(name, values.get(otherwise))
    if not isinstance(size, int) or size < 1:
        got = f"{size} as {name} in {where}"
        raise ConfigError(key, got, "a whole number from 1", "check the model folder")
    return size


def read_config(key: str, folder: Path) -> dict[str, Any]:
    """A model folder's config.json as it stands. Raises ConfigError where there is none that can be read."""
    if not folder.is_dir():
        way_out = (
            "give a folder in Hugging Face format (`hf download NAME --revision COMMIT --local-dir DIR` makes one)"
        )
        raise ConfigError(key, f"no folder {folder}", "a model folder", way_out)
    file = folder / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(key, f"no {file}", "a model folder in Hugging Face format", "check the path") from None
    except (OSError, ValueError) as error:
        raise ConfigError(key, f"{file}: {error}", "a readable JSON file", "save the model again") from None
    if not isinstance(values, dict):
        raise ConfigError(key, f"{file} without fields", "a JSON object", "save the model again")
    return values
