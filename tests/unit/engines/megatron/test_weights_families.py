"""What a config.json means, what of it is refused, and that the tables name what checkpoints and Megatron hold."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_opd.engines.megatron.families import (
    FAMILIES,
    Experts,
    architecture_of,
    family_of,
    padded_vocab_size,
    read_architecture,
)
from nemo_opd.errors import ConfigError
from tests.helpers.tiny import tiny_config

# The settings of published checkpoints, as they stand in their config.json (transformers 4 format).
QWEN3_0_6B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN25_7B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 152064,
}
LLAMA32_1B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
MISTRAL_7B: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}


QWEN3_30B_A3B: dict[str, Any] = {
    **QWEN3_0_6B,
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
}


def test_experts_of_a_published_model() -> None:
    """Its 18,867 tensors by name, which a folder has one by one and transformers keeps in memory by layers."""
    architecture = architecture_of(QWEN3_30B_A3B)
    assert architecture.experts == Experts(128, per_token=8, normalised=True)
    assert architecture.ffn_hidden_size == 768
    tensors = architecture.hf_tensors()
    assert len(tensors) == 48 * (9 + 3 * 128) + 3
    assert tensors["model.layers.47.mlp.experts.127.down_proj.weight"] == (2048, 768)
    assert tensors["model.layers.0.mlp.gate.weight"] == (128, 2048)
    assert sum(math.prod(shape) for shape in tensors.values()) == 30_532_122_624
    saved_by_5 = {**QWEN3_30B_A3B, "num_local_experts": 128}
    del saved_by_5["num_experts"]
    assert architecture_of(saved_by_5) == architecture
    architecture.check_layout(4, 1, "student", 8)
    for ep in (3, 256):
        with pytest.raises(ConfigError, match=r"student\.expert_model_parallel_size"):
            architecture.check_layout(1, 1, "student", ep)


def test_names_of_experts_in_both_specs() -> None:
    """Megatron-core 0.16.1: `SequentialMLP` has a list of experts, `TEGroupedMLP` weights 0, 1, ... in one layer."""
    names = {w.names: w for w in architecture_of(QWEN3_30B_A3B).weights() if w.expert is not None}
    gate_up = names[
        ("decoder.layers.3.mlp.experts.local_experts.17.linear_fc1.weight",
         "decoder.layers.3.mlp.experts.linear_fc1.weight17")
    ]  # fmt: skip
    assert gate_up.expert == 17 and len(gate_up.hf) == 2 and len(names) == 48 * 128 * 2


def test_published_configurations() -> None:
    qwen3, qwen25, llama = (architecture_of(config) for config in (QWEN3_0_6B, QWEN25_7B, LLAMA32_1B))
    assert (qwen3.head_dim, qwen3.tied, qwen3.family.qk_norm, qwen3.family.qkv_bias) == (128, True, True, False)
    assert qwen3.sizes["query"] == 2048 and qwen3.sizes["hidden"] == 1024
    assert (qwen25.head_dim, qwen25.tied, qwen25.family.qk_norm, qwen25.family.qkv_bias) == (128, False, False, True)
    assert qwen25.rotary_base == 1e6 and qwen25.rope_scaling_factor is None
    assert (llama.rotary_base, llama.rope_scaling_factor, llama.norm_epsilon) == (5e5, 32.0, 1e-5)
    assert not llama.family.qk_norm and not llama.family.qkv_bias


def test_a_sliding_window_bounds_the_length() -> None:
    """Up to its length full attention is the same. Mistral's is 4096 where config.json does not say (null: none)."""
    without = {key: value for key, value in MISTRAL_7B.items() if key != "sliding_window"}
    for config, positions in (
        (MISTRAL_7B, 4096),
        (without, 4096),
        ({**MISTRAL_7B, "sliding_window": None}, 32768),
        ({**MISTRAL_7B, "sliding_window": 65536}, 32768),
    ):
        assert architecture_of(config).max_position_embeddings == positions
    with pytest.raises(ConfigError, match="sliding_window: got 0"):
        architecture_of({**MISTRAL_7B, "sliding_window": 0})
    assert architecture_of(QWEN25_7B).max_position_embeddings == 32768, "Qwen's is switched off by another key"


@pytest.mark.parametrize("published", [QWEN3_0_6B, QWEN25_7B, LLAMA32_1B, MISTRAL_7B])
def test_parameter_counts_of_published_models(published: dict[str, Any]) -> None:
    """Counts that transformers gives for the same configuration."""
    from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    classes = {"Qwen3": Qwen3Config, "Qwen2": Qwen2Config, "Llama": LlamaConfig, "Mistral": MistralConfig}
    config = classes[published["architectures"][0].removesuffix("ForCausalLM")](**published)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    ours = architecture_of(published).hf_tensors()
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if published["tie_word_embeddings"]:
        del theirs["lm_head.weight"]
    assert ours == theirs


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "mistral"])
def test_a_configuration_saved_by_the_installed_transformers(family: str, tmp_path: Path) -> None:
    rope = {**LLAMA32_1B["rope_scaling"], "rope_theta": 123456.0} if family == "llama" else {"rope_theta": 123456.0}
    config = tiny_config(family, tie_word_embeddings=True, rope_parameters=rope)
    config.architectures = [f"{family.capitalize()}ForCausalLM"]
    config.save_pretrained(tmp_path)
    architecture = read_architecture(tmp_path)
    assert architecture.tied and architecture.rotary_base == 123456.0
    assert architecture.rope_scaling_factor == (32.0 if family == "llama" else None)
    assert architecture.head_dim == (16 if family == "qwen3" else 8)


def test_an_unsupported_architecture_is_refused_by_name() -> None:
    with pytest.raises(ConfigError) as error:
        family_of({"architectures": ["MixtralForCausalLM"]})
    message = str(error.value)
    assert "MixtralForCausalLM" in message
    for supported in FAMILIES:
        assert supported in message
    with pytest.raises(ConfigError, match="no architecture"):
        family_of({})


@pytest.mark.parametrize(
    ("base", "change", "key"),
    [
        (LLAMA32_1B, {"attention_bias": True}, "attention_bias"),
        (LLAMA32_1B, {"mlp_bias": True}, "mlp_bias"),
        (QWEN3_0_6B, {"attention_dropout": 0.1}, "attention_dropout"),
        (QWEN3_0_6B, {"hidden_act": "gelu"}, "hidden_act"),
        (QWEN25_7B, {"use_sliding_window": True}, "use_sliding_window"),
        (QWEN25_7B, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        (QWEN25_7B, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type"),
        (QWEN25_7B, {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rope_type"),
        (QWEN25_7B, {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_type"),
        (QWEN25_7B, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (QWEN25_7B, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA32_1B, {"rope_scaling": {**LLAMA32_1B["rope_scaling"], "low_freq_factor": 2}}, "low_freq_factor"),
        (LLAMA32_1B, {"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "low_freq_factor"),
        (QWEN3_30B_A3B, {"decoder_sparse_step": 2}, "decoder_sparse_step"),
        (QWEN3_30B_A3B, {"mlp_only_layers": [0]}, "mlp_only_layers"),
        (QWEN3_30B_A3B, {"num_experts_per_tok": 1}, "num_experts_per_tok"),
        (QWEN3_30B_A3B, {"num_experts_per_tok": 129}, "num_experts_per_tok"),
        (QWEN3_30B_A3B, {"moe_intermediate_size": None}, "moe_intermediate_size"),
        (QWEN3_0_6B, {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        (QWEN3_0_6B, {"auto_map": {"AutoModelForCausalLM": "modeling.Evil"}}, "auto_map"),
        (QWEN3_0_6B, {"hidden_size": None}, "hidden_size"),
        (QWEN3_0_6B, {"num_hidden_layers": 0}, "num_hidden_layers"),
        (QWEN3_0_6B, {"vocab_size": "many"}, "vocab_size"),
        (QWEN3_0_6B, {"num_key_value_heads": 3}, "num_key_value_heads"),
    ],
)
def test_what_is_not_represented_is_refused(base: dict[str, Any], change: dict[str, Any], key: str) -> None:
    architecture_of(base)
    with pytest.raises(ConfigError) as error:
        architecture_of({**base, **change}, where="model/config.json")
    assert error.value.key.startswith("model/config.json: ") and error.value.key.endswith(key)


def test_a_config_that_cannot_be_read_names_its_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: got no such file"):
        read_architecture(tmp_path)
    for text in ("{", "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=r"config\.json"):
            read_architecture(tmp_path)


def test_layouts_that_do_not_divide_are_refused() -> None:
    architecture = architecture_of(QWEN25_7B)  # 28 heads, 4 groups, 28 layers, ffn 18944
    architecture.check_layout(4, 7)
    architecture.check_layout(28 // 7, 1)
    for tp, pp, key in ((8, 1, "student.tensor"), (7, 1, "student.tensor"), (1, 8, "student.pipeline")):
        with pytest.raises(ConfigError) as error:
            architecture.check_layout(tp, pp)
        assert error.value.key.startswith(key) and "use " in error.value.way_out
    odd = replace(architecture, num_attention_heads=8, num_query_groups=1, head_dim=6)  # 60 rows
    with pytest.raises(ConfigError, match="60 rows of query"):
        odd.check_layout(8, 1)


def test_vocabulary_padding() -> None:
    assert padded_vocab_size(97, 1, 1) == 97
    assert padded_vocab_size(97, 1, 4) == 100
    assert padded_vocab_size(128, 128, 8) == 1024
    assert padded_vocab_size(151936, 128, 8) == 152576


# One decoder layer of a GPTModel built with `get_gpt_layer_with_transformer_engine_spec`, written down from
# megatron-core 0.16.1: linear_qkv and linear_fc1 are TELayerNormColumnParallelLinear (weight, bias if any,
# layer_norm_weight; with RMSNorm no layer_norm_bias), linear_proj and linear_fc2 TERowParallelLinear, q_layernorm and
# k_layernorm TENorm, input_layernorm and pre_mlp_layernorm IdentityOp (no parameters).
TRANSFORMER_ENGINE_LAYER = {
    "self_attention.linear_qkv.layer_norm_weight": (1024,),
    "self_attention.linear_qkv.weight": (4096, 1024),
    "self_attention.linear_proj.weight": (1024, 2048),
    "self_attention.q_layernorm.weight": (128,),
    "self_attention.k_layernorm.weight": (128,),
    "mlp.linear_fc1.layer_norm_weight": (1024,),
    "mlp.linear_fc1.weight": (6144, 1024),
    "mlp.linear_fc2.weight": (1024, 3072),
}


def test_names_and_shapes_of_the_transformer_engine_spec() -> None:
    from nemo_opd.engines.megatron.sharding import local_shape

    architecture = architecture_of(QWEN3_0_6B)
    prefix = "decoder.layers.5."
    ours = {
        weight.names[-1].removeprefix(prefix): local_shape(weight, architecture, 151936, 1)
        for weight in architecture.weights()
        if weight.megatron.startswith(prefix)
    }
    assert ours == TRANSFORMER_ENGINE_LAYER
    bias = [w.names for w in architecture_of(QWEN25_7B).weights() if w.megatron.endswith("bias")]
    assert bias[0] == ("decoder.layers.0.self_attention.linear_qkv.bias",) and len(bias) == 28


def test_the_tables_import_neither_torch_nor_megatron() -> None:
    code = (
        "import sys, json; from nemo_opd.engines.megatron.families import architecture_of;"
        f"architecture_of(json.loads({json.dumps(json.dumps(QWEN3_0_6B))}));"
        "sys.exit(' '.join({'torch', 'megatron', 'nemo'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
