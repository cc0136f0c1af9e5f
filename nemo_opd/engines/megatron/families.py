"""Which model families there are, and how each one's Hugging Face weights become Megatron parameters.

A family is data: its architecture's name, what its attention has, and the table of one decoder layer
(`nemo_opd.engines.megatron.tables`). What the tables cannot say yet (a `+1` on a norm's weight) is one more field of
`Weight`. Whatever a config.json asks for that is not represented is refused, not ignored.

Imports neither torch nor Megatron, so that a recipe can be checked against a model's config.json at once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_opd.engines.megatron.tables import (
    ATTENTION,
    EMBEDDING,
    EXPERT,
    FINAL_NORM,
    GATED_MLP,
    OUTPUT,
    QK_NORM,
    QKV_BIAS,
    ROUTER,
    HFTensor,
    Shard,
    Weight,
)
from nemo_opd.errors import ConfigError


@dataclass(frozen=True)
class Family:
    """A model family: one entry of a config.json's `architectures`."""

    name: str
    architecture: str
    layer: tuple[Weight, ...]
    """Table of one decoder layer, in the order in which Hugging Face names its tensors."""
    expert: tuple[Weight, ...] = ()
    """Table of one expert of a mixture-of-experts layer; empty: a dense model."""
    default_head_dim: int | None = None
    """What the architecture assumes when config.json does not say; None: hidden size / heads."""
    sliding_window: bool = False
    """A position sees at most so many of the last ones as config.json says (no number: all)."""

    @property
    def qkv_bias(self) -> bool:
        return any(weight in self.layer for weight in QKV_BIAS)

    @property
    def qk_norm(self) -> bool:
        return any(weight in self.layer for weight in QK_NORM)


FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (
        Family("Qwen3", "Qwen3ForCausalLM", ATTENTION + QK_NORM + GATED_MLP, default_head_dim=128),
        Family("Qwen2 and Qwen2.5", "Qwen2ForCausalLM", ATTENTION + QKV_BIAS + GATED_MLP),
        Family("Llama 3", "LlamaForCausalLM", ATTENTION + GATED_MLP),
        Family("Mistral", "MistralForCausalLM", ATTENTION + GATED_MLP, sliding_window=True),
        Family("Qwen3-MoE", "Qwen3MoeForCausalLM", ATTENTION + QK_NORM + ROUTER, EXPERT),
    )
}
"""The supported families by the name that config.json gives in `architectures`."""

_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0,),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (1,),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([],),
    "quantization_config": (),
    "auto_map": (),
}
"""Optional keys of config.json with the values that the tables above can represent; () for none at all."""

_MISTRAL_WINDOW = 4096
"""The sliding window of a Mistral whose config.json leaves it out; null says that there is none."""

_LLAMA3_ROPE = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
"""What Megatron-core's rotary embedding assumes of Llama 3's frequency scaling; only `factor` is an argument there."""


@dataclass(frozen=True)
class Experts:
    """The mixture of experts in each layer."""

    count: int
    per_token: int
    normalised: bool
    """The weights of a token's experts sum to 1: softmax over the chosen, not a part of the softmax over all."""


@dataclass(frozen=True)
class Architecture:
    """What a config.json says, checked. Sizes are those of the whole model, before any padding or sharding."""

    family: Family
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    """Longest sequence. Where a sliding window is shorter it is the window: so far full attention is the same."""
    norm_epsilon: float
    rotary_base: float
    rope_scaling_factor: float | None
    """Llama 3's frequency scaling; None: plain rotary embedding."""
    tied: bool
    """The output layer is the embedding."""
    experts: Experts | None = None
    """None: a dense model. Otherwise `ffn_hidden_size` is that of one expert."""

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that `HFTensor.shape` names."""
        return {
            "vocab": self.vocab_size,
            "hidden": self.hidden_size,
            "head": self.head_dim,
            "query": self.num_attention_heads * self.head_dim,
            "key_value": self.num_query_groups * self.head_dim,
            "ffn": self.ffn_hidden_size,
            "experts": self.experts.count if self.experts else 0,
        }

    @property
    def output(self) -> HFTensor:
        """The Hugging Face tensor that the output layer multiplies with."""
        return EMBEDDING if self.tied else OUTPUT

    def shape(self, tensor: HFTensor) -> tuple[int, ...]:
        """Shape of a whole Hugging Face tensor."""
        return tuple(self.sizes[size] for size in tensor.shape)

    def weights(self) -> Iterator[Weight]:
        """Every Megatron parameter of the whole model, first layer to last."""
        yield Weight("embedding.word_embeddings.weight", (EMBEDDING,), Shard.VOCAB)
        for layer in range(self.num_layers):
            for weight in self.family.layer:
                yield weight.at(layer)
            for expert in range(self.experts.count if self.experts else 0):
                for weight in self.family.expert:
                    yield weight.at(layer, expert)
        yield FINAL_NORM
        yield Weight("output_layer.weight", (self.output,), Shard.VOCAB, copy=self.tied)

    def hf_tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the Hugging Face checkpoint, in the order of export."""
        return {t.name: self.shape(t) for weight in self.weights() if not weight.copy for t in weight.hf}

    def redundant_hf_names(self) -> frozenset[str]:
        """Names that older checkpoints carry and nobody needs: a copy of tied embeddings, buffers of the rotary
        embedding."""
        buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(self.num_layers)}
        return frozenset(buffers | ({OUTPUT.name} if self.tied else set()))

    def transformer_config_fields(self) -> dict[str, Any]:
        """Fields of Megatron's `TransformerConfig` that the architecture decides."""
        from torch.nn.functional import silu

        return {
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "num_query_groups": self.num_query_groups,
            "kv_channels": self.head_dim,
            "ffn_hidden_size": self.ffn_hidden_size,
            "normalization": "RMSNorm",
            "layernorm_epsilon": self.norm_epsilon,
            "qk_layernorm": self.family.qk_norm,
            "add_bias_linear": False,
            "add_qkv_bias": self.family.qkv_bias,
            "gated_linear_unit": True,
            "activation_func": silu,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            **(self._expert_fields(self.experts) if self.experts else {}),
        }

    def _expert_fields(self, experts: Experts) -> dict[str, Any]:
        return {
            "num_moe_experts": experts.count,
            "moe_router_topk": experts.per_token,
            "moe_ffn_hidden_size": self.ffn_hidden_size,
            "moe_router_pre_softmax": not experts.normalised,
            "expert_tensor_parallel_size": 1,
        }

    def gpt_model_kwargs(self, tensor_model_parallel_size: int, vocab_padding_multiple: int = 1) -> dict[str, Any]:
        """Arguments of Megatron's `GPTModel` that the architecture decides; `vocab_size` comes out padded."""
        return {
            "vocab_size": padded_vocab_size(self.vocab_size, vocab_padding_multiple, tensor_model_parallel_size),
            "max_sequence_length": self.max_position_embeddings,
            "position_embedding_type": "rope",
            "rotary_percent": 1.0,
            "rotary_base": self.rotary_base,
            "rope_scaling": self.rope_scaling_factor is not None,
            "rope_scaling_factor": self.rope_scaling_factor or 1.0,
            "share_embeddings_and_output_weights": self.tied,
        }

    def check_layout(
        self,
        tensor_model_parallel_size: int,
        pipeline_model_parallel_size: int,
        key: str = "student",
        expert_model_parallel_size: int = 1,
        virtual_pipeline_model_parallel_size: int = 1,
    ) -> None:
        """Refuse a layout whose sizes do not divide.

        Query groups may be fewer than tensor-parallel ranks if they divide them (Megatron then cuts groups).

        Raises:
            ConfigError: naming ``{key}.tensor_model_parallel_size``, ``{key}.pipeline_model_parallel_size``,
                ``{key}.virtual_pipeline_model_parallel_size`` or ``{key}.expert_model_parallel_size``.
        """
        tp, pp, groups = tensor_model_parallel_size, pipeline_model_parallel_size, self.num_query_groups
        cut = {
            "attention heads": self.num_attention_heads,
            "rows of query, key and value together": self.sizes["query"] + 2 * self.sizes["key_value"],
        }
        if self.experts is None:
            cut["rows of the gate projection"] = self.ffn_hidden_size
        for what, size in cut.items():
            if size % tp:
                raise _does_not_divide(f"{key}.tensor_model_parallel_size", tp, f"the model's {size} {what}", size)
        if groups % tp and tp % groups:
            expected = f"a divisor or a multiple of the model's {groups} key-value heads"
            raise ConfigError(f"{key}.tensor_model_parallel_size", tp, expected, f"use {math.gcd(tp, groups)}")
        if self.num_layers % pp:
            what = f"the model's {self.num_layers} layers"
            raise _does_not_divide(f"{key}.pipeline_model_parallel_size", pp, what, self.num_layers)
        each, vp = self.num_layers // pp, virtual_pipeline_model_parallel_size
        if each % vp:
            what = f"the {each} layers of a pipeline stage"
            raise _does_not_divide(f"{key}.virtual_pipeline_model_parallel_size", vp, what, each)
        experts, ep = self.experts.count if self.experts else 1, expert_model_parallel_size
        if experts % ep:
            what = f"the model's {experts} experts" if self.experts else "1, as a dense model has no experts"
            raise _does_not_divide(f"{key}.expert_model_parallel_size", ep, what, experts)


def padded_vocab_size(vocab_size: int, multiple: int, tensor_model_parallel_size: int) -> int:
    """The vocabulary's size in Megatron: the next multiple of ``multiple * tensor_model_parallel_size``."""
    unit = multiple * tensor_model_parallel_size
    return (vocab_size + unit - 1) // unit * unit


def read_architecture(folder: str | Path) -> Architecture:
    """The architecture of the Hugging Face checkpoint in `folder`.

    Raises:
        ConfigError: no config.json, not JSON, or something in it that is not supported.
    """
    return architecture_of(read_hf_config(folder), where=str(Path(folder) / "config.json"))


def read_hf_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a Hugging Face folder, as it stands there."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        way_out = "give the path of a local folder saved in Hugging Face format"
        raise ConfigError(str(path), "no such file", "a model folder with its config.json", way_out) from None
    except (ValueError, OSError) as error:
        raise ConfigError(str(path), error, "a JSON file that can be read", "copy the model folder again") from error
    if not isinstance(config, dict):
        raise ConfigError(str(path), type(config).__name__, "a JSON object", "copy the model folder again")
    return config


def family_of(hf_config: Mapping[str, Any], where: str = "config.json") -> Family:
    """The family that `architectures` names.

    Raises:
        ConfigError: the architecture is not supported; the message lists those that are.
    """
    architectures = hf_config.get("architectures") or []
    if len(architectures) == 1 and architectures[0] in FAMILIES:
        return FAMILIES[architectures[0]]
    supported = ", ".join(f"{family.architecture} ({family.name})" for family in FAMILIES.values())
    got = ", ".join(map(str, architectures)) or "no architecture"
    raise ConfigError(f"{where}: architectures", got, f"one of {supported}", "use a model of a supported family")


def architecture_of(hf_config: Mapping[str, Any], where: str = "config.json") -> Architecture:
    """Read the sizes and refuse what is not represented.

    Args:
        hf_config: the parsed config.json, of transformers 4 or 5.
        where: the file's name, for messages.

    Raises:
        ConfigError: an unsupported architecture or setting, a missing or impossible size; names the key.
    """
    family = family_of(hf_config, where)
    _refuse_unrepresented(hf_config, where)
    heads = _positive(hf_config, "num_attention_heads", where)
    hidden = _positive(hf_config, "hidden_size", where)
    groups = _positive(hf_config, "num_key_value_heads", where, default=heads)
    if heads % groups:
        raise _does_not_divide(f"{where}: num_key_value_heads", groups, f"the {heads} attention heads", heads)
    rotary_base, rope_scaling_factor = _rope(hf_config, where)
    width = "moe_intermediate_size" if family.expert else "intermediate_size"
    return Architecture(
        family=family,
        num_layers=_positive(hf_config, "num_hidden_layers", where),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=_positive(hf_config, "head_dim", where, default=family.default_head_dim or hidden // heads),
        ffn_hidden_size=_positive(hf_config, width, where),
        vocab_size=_positive(hf_config, "vocab_size", where),
        max_position_embeddings=_positions(family, hf_config, where),
        norm_epsilon=float(hf_config.get("rms_norm_eps", 1e-6)),
        rotary_base=rotary_base,
        rope_scaling_factor=rope_scaling_factor,
        tied=bool(hf_config.get("tie_word_embeddings", False)),
        experts=_experts(hf_config, where) if family.expert else None,
    )


def _experts(hf_config: Mapping[str, Any], where: str) -> Experts:
    """`num_experts` in transformers 4 is `num_local_experts` in 5."""
    key = "num_local_experts" if "num_local_experts" in hf_config else "num_experts"
    count, chosen = _positive(hf_config, key, where), _positive(hf_config, "num_experts_per_tok", where)
    normalised = bool(hf_config.get("norm_topk_prob", False))
    least = 2 if normalised else 1  # the weight of a single one would be 1 whatever the router says
    if not least <= chosen <= count:
        expected = f"{least} to {count}, the number of experts"
        raise ConfigError(f"{where}: num_experts_per_tok", chosen, expected, "use another model")
    return Experts(count, chosen, normalised)


def _does_not_divide(key: str, got: int, what: str, size: int) -> ConfigError:
    return ConfigError(key, got, f"a divisor of {what}", f"use {math.gcd(got, size)}")


def _positive(hf_config: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    value = hf_config.get(key)
    value = default if value is None else value
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise ConfigError(f"{where}: {key}", value, "a positive integer", "copy the model folder again")


def _positions(family: Family, hf_config: Mapping[str, Any], where: str) -> int:
    """Longest sequence in which full attention computes what the model means."""
    positions = _positive(hf_config, "max_position_embeddings", where)
    if not family.sliding_window or hf_config.get("sliding_window", _MISTRAL_WINDOW) is None:
        return positions
    return min(positions, _positive(hf_config, "sliding_window", where, default=_MISTRAL_WINDOW))


def _refuse_unrepresented(hf_config: Mapping[str, Any], where: str) -> None:
    for key, allowed in _ONLY.items():
        value = hf_config.get(key)
        if value is not None and value not in allowed:
            expected = f"one of {', '.join(map(repr, allowed))}" if allowed else "no such key"
            raise ConfigError(f"{where}: {key}", value, expected, "use a model without it: it is not supported")
    other = sorted(set(hf_config.get("layer_types") or ()) - {"full_attention"})
    if other:
        raise ConfigError(f"{where}: layer_types", ", ".join(other), "full_attention only", "use another model")


def _rope(hf_config: Mapping[str, Any], where: str) -> tuple[float, float | None]:
    """Base and Llama 3 scaling factor; `rope_parameters` in transformers 5, `rope_theta` and `rope_scaling` in 4."""
    key = "rope_scaling" if hf_config.get("rope_scaling") else "rope_parameters"
    rope = hf_config.get(key) or {}
    base = float(rope.get("rope_theta", hf_config.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3") or any(isinstance(value, Mapping) for value in rope.values()):
        got = kind if kind not in ("default", "llama3") else "a different one for each kind of layer"
        way_out = "use a model with one of these; a long-context variant usually has a plain one beside it"
        raise ConfigError(f"{where}: {key}.rope_type", got, "default or llama3", way_out)
    if rope.get("partial_rotary_factor", 1) != 1:
        got = rope["partial_rotary_factor"]
        raise ConfigError(f"{where}: {key}.partial_rotary_factor", got, "1", "use another model")
    if kind == "default":
        return base, None
    for name, value in _LLAMA3_ROPE.items():
        if rope.get(name) != value:
            way_out = "use another model: Megatron-core's rotary embedding fixes this value"
            raise ConfigError(f"{where}: {key}.{name}", rope.get(name), str(value), way_out)
    if not rope.get("factor", 0) >= 1:
        raise ConfigError(f"{where}: {key}.factor", rope.get("factor"), "a number from 1 up", "mend config.json")
    return base, float(rope["factor"])
