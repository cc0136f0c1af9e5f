"""The sizes of a model and of its parts on one rank: counts, without a tensor.

`tests/unit/planning/test_blueprint.py` compares every count with the model that Megatron builds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_opd.configuration.model_files import SUPPORTED_ARCHITECTURES
from nemo_opd.errors import ConfigError

DENSE: dict[str, tuple[bool, bool]] = {
    "Qwen3ForCausalLM": (True, False),
    "Qwen2ForCausalLM": (False, True),
    "LlamaForCausalLM": (False, False),
    "MistralForCausalLM": (False, False),
}
"""Architectures with (norms of query and key, biases of query, key and value)."""
EXPERTS: dict[str, str] = {"Qwen3MoeForCausalLM": "Qwen3ForCausalLM"}
"""Mixtures of experts, and the dense architecture that they are without their experts."""

_WAY_OUT = "plan a model of one of these families"


@dataclass(frozen=True)
class Spread:
    """How one model lies over `tp x cp x dp x pp` ranks; experts over `ep` of the ranks of a stage, each of them whole.

    Example: 8 ranks with tensor parallel 2 and pipeline parallel 1 are ``Spread(tp=2, pp=1, dp=4)``.
    """

    tp: int
    pp: int
    dp: int
    ep: int = 1
    sequence_parallel: bool = False
    cp: int = 1
    vp: int = 1
    """Chunks of layers on each pipeline stage."""

    @property
    def ranks(self) -> int:
        return self.stage_ranks * self.pp

    def filled(self, rows: int) -> float:
        """Time that so many equal rows take, by that in which a stage works on them: a pipeline fills and drains.

        Rows go through interleaved stages in rounds of `pp`, through one chunk after the other, so that filling and
        draining take a chunk's time for each other stage, not a stage's (Narayanan and others 2021, arXiv 2104.04473,
        section 2.2). Between the chunks of a last round with fewer rows stages wait for one another.
        """
        rounds, rest = divmod(rows, self.pp)
        steps = rounds * self.pp * self.vp + ((self.vp - 1) * self.pp + rest if rest else 0)
        return (steps + self.pp - 1) / (rows * self.vp)

    @property
    def stage_ranks(self) -> int:
        """Of a pipeline stage, all replicas together."""
        return self.tp * self.parts

    @property
    def parts(self) -> int:
        """By what the positions of a step are divided: replicas, and the ranks of each that share its sequences. All of
        them hold the same parameters."""
        return self.dp * self.cp

    @property
    def expert_dp(self) -> int:
        """Replicas of an expert."""
        return self.stage_ranks // self.ep

    @property
    def sequence(self) -> int:
        """By what the positions of a row are divided outside of the tensor-parallel layers."""
        return self.tp if self.sequence_parallel else 1


@dataclass(frozen=True)
class Parameters:
    """Numbers of one rank's parameters: those that all replicas share, and those of its experts."""

    dense: int
    expert: int = 0

    @property
    def total(self) -> int:
        return self.dense + self.expert


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a whole model, before padding and sharding."""

    name: str
    layers: int
    hidden: int
    heads: int
    groups: int
    """Key-value heads."""
    head: int
    """Width of one head."""
    ffn: int
    vocabulary: int
    tied: bool
    qk_norm: bool
    qkv_bias: bool
    experts: int = 0
    """Of a layer; 0 in a dense model."""
    experts_per_token: int = 0
    expert_ffn: int = 0

    @classmethod
    def of(cls, key: str, name: str, values: Mapping[str, Any], where: str) -> ModelShape:
        """From a config.json.

        Args:
            key: the setting that names the model, for errors.
            where: where the values come from, for errors.

        Raises:
            ConfigError: an architecture that is not planned, or layers that are not all alike.
        """
        architecture = (values.get("architectures") or ["none"])[0]
        dense = EXPERTS.get(architecture, architecture)
        if dense not in DENSE:
            expected = f"one of {', '.join(SUPPORTED_ARCHITECTURES)}"
            raise ConfigError(key, f"a model of architecture {architecture} ({where})", expected, _WAY_OUT)
        if values.get("mlp_only_layers") or values.get("decoder_sparse_step", 1) != 1:
            expected = "experts in every layer"
            raise ConfigError(key, f"layers with and without experts ({where})", expected, _WAY_OUT)
        heads, hidden = values["num_attention_heads"], values["hidden_size"]
        qk_norm, qkv_bias = DENSE[dense]
        return cls(
            name=name,
            layers=values["num_hidden_layers"],
            hidden=hidden,
            heads=heads,
            groups=values.get("num_key_value_heads") or heads,
            head=values.get("head_dim") or (128 if dense == "Qwen3ForCausalLM" else hidden // heads),
            ffn=values["intermediate_size"],
            vocabulary=values["vocab_size"],
            tied=bool(values.get("tie_word_embeddings", False)),
            qk_norm=qk_norm,
            qkv_bias=qkv_bias,
            experts=values.get("num_experts") or values.get("num_local_experts") or 0,  # transformers 4, and 5
            experts_per_token=values.get("num_experts_per_tok") or 0,
            expert_ffn=values.get("moe_intermediate_size") or 0,
        )

    @property
    def query(self) -> int:
        return self.heads * self.head

    @property
    def key_value(self) -> int:
        return self.groups * self.head

    def vocabulary_rows(self, tp: int, multiple: int = 1) -> int:
        """Rows of embedding and output layer on one tensor rank, padding included."""
        unit = multiple * tp
        return (self.vocabulary + unit - 1) // unit * multiple

    def layer(self, tp: int = 1, ep: int = 1) -> Parameters:
        """One decoder layer on one rank."""
        h, qkv = self.hidden, self.query + 2 * self.key_value
        dense = 2 * h + (2 * self.head if self.qk_norm else 0)
        dense += (h * qkv + (qkv if self.qkv_bias else 0) + self.query * h) // tp
        if not self.experts:
            return Parameters(dense + 3 * h * self.ffn // tp)
        return Parameters(dense + self.experts * h, self.experts // ep * 3 * h * self.expert_ffn)

    def linear(self, tp: int = 1, ep: int = 1) -> Parameters:
        """The matrices of one decoder layer on one rank, without router, norms and biases: what may be in FP8."""
        attention = self.hidden * (2 * self.query + 2 * self.key_value) // tp
        if not self.experts:
            return Parameters(attention + 3 * self.hidden * self.ffn // tp)
        return Parameters(attention, self.experts // ep * 3 * self.hidden * self.expert_ffn)

    def matrices(self, share: float) -> float:
        """Numbers in all layers' matrices, with `share` of the experts of each."""
        linear = self.linear()
        return self.layers * (linear.dense + share * linear.expert)

    def stage(self, spread: Spread, stage: int, multiple: int = 1) -> Parameters:
        """One rank of a pipeline stage. A tied output layer on a stage of its own is a second copy."""
        layer, count = self.layer(spread.tp, spread.ep), self.layers // spread.pp
        table = self.vocabulary_rows(spread.tp, multiple) * self.hidden
        dense = layer.dense * count
        dense += table if stage == 0 else 0
        if stage == spread.pp - 1:
            dense += self.hidden + (0 if self.tied and spread.pp == 1 else table)
        return Parameters(dense, layer.expert * count)

    @property
    def parameters(self) -> int:
        """Of the whole model, as its checkpoint counts them."""
        return self.stage(Spread(1, 1, 1), 0).total

    @property
    def active(self) -> int:
        """Parameters of the layers that one token passes through: without embedding and output layer."""
        layer = self.layer()
        used = layer.expert * self.experts_per_token // self.experts if self.experts else 0
        return self.layers * (layer.dense + used)

    def cache_bytes(self, width: int) -> int:
        """Of keys and values, for one position of one sequence; `width` in bytes."""
        return 2 * self.layers * self.key_value * width
