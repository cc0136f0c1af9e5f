"""Which Hugging Face tensors each Megatron parameter is made of, as data: the tables of one decoder layer.

Imports neither torch nor Megatron, so that a recipe can be checked against a model's config.json at once.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, replace


class Shard(enum.Enum):
    """How tensor parallelism cuts a Megatron parameter (see `nemo_opd.engines.megatron.sharding`)."""

    REPLICATED = "every rank holds all of it"
    VOCAB = "cut along dimension 0, the vocabulary, which is padded with zero rows"
    ROW = "cut along dimension 1, the input of a row-parallel layer"
    QKV = "query, key and value interleaved by query group, then cut along dimension 0"
    GATE_UP = "each rank's rows of gate, then its rows of up"


@dataclass(frozen=True)
class HFTensor:
    """A tensor of the Hugging Face checkpoint; `shape` names entries of `Architecture.sizes`."""

    name: str
    shape: tuple[str, ...]


@dataclass(frozen=True)
class Weight:
    """One Megatron parameter and the Hugging Face tensors that it is made of.

    Example: the fused QKV projection is ``Weight("...self_attention.linear_qkv.weight", (q_proj, k_proj, v_proj),
    Shard.QKV)``. A ``{layer}`` in names stands for the layer's number in the whole model, from 0, and an ``{expert}``
    for the expert's in its layer.
    """

    megatron: str
    """Name in a GPTModel built from the local layer spec."""
    hf: tuple[HFTensor, ...]
    shard: Shard = Shard.REPLICATED
    transformer_engine: str | None = None
    """Name in a GPTModel built from the Transformer Engine spec, where it differs: there the norm belongs to the
    linear layer behind it, and experts lie side by side."""
    copy: bool = False
    """A second copy of a weight that another entry exports (tied output layer on its own pipeline stage)."""
    expert: int | None = None
    """Of an expert: its number in the layer, from 0. Tensor parallelism does not cut experts."""

    def at(self, layer: int, expert: int | None = None) -> Weight:
        """The same entry of a layer's table for layer `layer`, and of an expert's table for `expert`."""
        numbers = {"layer": layer, "expert": expert}
        return replace(
            self,
            megatron=self.megatron.format(**numbers),
            transformer_engine=self.transformer_engine and self.transformer_engine.format(**numbers),
            hf=tuple(replace(tensor, name=tensor.name.format(**numbers)) for tensor in self.hf),
            expert=expert,
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The Megatron names under which the parameter may be found."""
        return (self.megatron,) if self.transformer_engine is None else (self.megatron, self.transformer_engine)


_MEGATRON_LAYER = "decoder.layers.{layer}."
_HF_LAYER = "model.layers.{layer}."


def _layer(
    megatron: str, hf: Mapping[str, tuple[str, ...]], shard: Shard = Shard.REPLICATED, te: str | None = None
) -> Weight:
    tensors = tuple(HFTensor(_HF_LAYER + name, shape) for name, shape in hf.items())
    return Weight(_MEGATRON_LAYER + megatron, tensors, shard, te and _MEGATRON_LAYER + te)


ATTENTION = (
    _layer(
        "input_layernorm.weight",
        {"input_layernorm.weight": ("hidden",)},
        te="self_attention.linear_qkv.layer_norm_weight",
    ),
    _layer(
        "self_attention.linear_qkv.weight",
        {
            "self_attn.q_proj.weight": ("query", "hidden"),
            "self_attn.k_proj.weight": ("key_value", "hidden"),
            "self_attn.v_proj.weight": ("key_value", "hidden"),
        },
        Shard.QKV,
    ),
    _layer("self_attention.linear_proj.weight", {"self_attn.o_proj.weight": ("hidden", "query")}, Shard.ROW),
)

QKV_BIAS = (
    _layer(
        "self_attention.linear_qkv.bias",
        {
            "self_attn.q_proj.bias": ("query",),
            "self_attn.k_proj.bias": ("key_value",),
            "self_attn.v_proj.bias": ("key_value",),
        },
        Shard.QKV,
    ),
)

QK_NORM = (
    _layer("self_attention.q_layernorm.weight", {"self_attn.q_norm.weight": ("head",)}),
    _layer("self_attention.k_layernorm.weight", {"self_attn.k_norm.weight": ("head",)}),
)

GATED_MLP = (
    _layer(
        "pre_mlp_layernorm.weight",
        {"post_attention_layernorm.weight": ("hidden",)},
        te="mlp.linear_fc1.layer_norm_weight",
    ),
    _layer(
        "mlp.linear_fc1.weight",
        {"mlp.gate_proj.weight": ("ffn", "hidden"), "mlp.up_proj.weight": ("ffn", "hidden")},
        Shard.GATE_UP,
    ),
    _layer("mlp.linear_fc2.weight", {"mlp.down_proj.weight": ("hidden", "ffn")}, Shard.ROW),
)

ROUTER = (
    _layer("pre_mlp_layernorm.weight", {"post_attention_layernorm.weight": ("hidden",)}),
    _layer("mlp.router.weight", {"mlp.gate.weight": ("experts", "hidden")}),
)
"""What stands in the place of `GATED_MLP` in a mixture-of-experts layer, besides the experts."""

EXPERT = (
    _layer(
        "mlp.experts.local_experts.{expert}.linear_fc1.weight",
        {
            "mlp.experts.{expert}.gate_proj.weight": ("ffn", "hidden"),
            "mlp.experts.{expert}.up_proj.weight": ("ffn", "hidden"),
        },
        Shard.GATE_UP,
        te="mlp.experts.linear_fc1.weight{expert}",
    ),
    _layer(
        "mlp.experts.local_experts.{expert}.linear_fc2.weight",
        {"mlp.experts.{expert}.down_proj.weight": ("hidden", "ffn")},
        Shard.ROW,
        te="mlp.experts.linear_fc2.weight{expert}",
    ),
)
"""Of one expert. Transformer Engine's grouped layer holds the experts of a rank as its weights 0, 1, ..."""

EMBEDDING = HFTensor("model.embed_tokens.weight", ("vocab", "hidden"))
OUTPUT = HFTensor("lm_head.weight", ("vocab", "hidden"))
FINAL_NORM = Weight("decoder.final_layernorm.weight", (HFTensor("model.norm.weight", ("hidden",)),))
