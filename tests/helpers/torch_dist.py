"""Megatron's `torch_dist` format made by hand, without Megatron, from a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter


def megatron_tensors(source: Path) -> dict[str, Tensor]:
    """The weights of a Llama or Qwen3-MoE folder of `tiny_checkpoint` as Megatron has them, layers and experts each
    in one tensor."""
    hf, config = load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text())
    heads, groups, layers = (config[f"num_{name}"] for name in ("attention_heads", "key_value_heads", "hidden_layers"))

    def over_layers(name: str) -> Tensor:
        return torch.stack([hf[f"model.layers.{layer}.{name}.weight"] for layer in range(layers)])

    q, k, v = (over_layers(f"self_attn.{name}_proj") for name in "qkv")
    head = q.shape[1] // heads
    by_group = [tensor.unflatten(1, (groups, -1, head)) for tensor in (q, k, v)]
    found = {
        "embedding.word_embeddings.weight": hf["model.embed_tokens.weight"],
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": over_layers("input_layernorm"),
        "decoder.layers.self_attention.linear_qkv.weight": torch.cat(by_group, 2).flatten(1, 3),
        "decoder.layers.self_attention.linear_proj.weight": over_layers("self_attn.o_proj"),
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": over_layers("post_attention_layernorm"),
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
        "output_layer.weight": hf["lm_head.weight"],
    }
    if "moe_intermediate_size" not in config:
        gate, up = over_layers("mlp.gate_proj"), over_layers("mlp.up_proj")
        fc1, fc2, where = torch.cat([gate, up], 1), over_layers("mlp.down_proj"), "mlp"
    else:
        experts = range(sum("layers.0.mlp.experts" in name and "gate_proj" in name for name in hf))
        gate, up, fc2 = (
            torch.stack([over_layers(f"mlp.experts.{expert}.{name}_proj") for expert in experts], 1)
            for name in ("gate", "up", "down")
        )
        fc1, where = torch.cat([gate, up], 2), "mlp.experts.experts"
        found["decoder.layers.mlp.router.weight"] = over_layers("mlp.gate")
        for name in "qk":
            found[f"decoder.layers.self_attention.{name}_layernorm.weight"] = over_layers(f"self_attn.{name}_norm")
    return {
        **found,
        f"decoder.layers.{where}.linear_fc1.weight": fc1.contiguous(),
        f"decoder.layers.{where}.linear_fc2.weight": fc2.contiguous(),
    }


def save_torch_dist(tensors: dict[str, Tensor], folder: Path, backend: str = "torch_dist") -> Path:
    """As Megatron lays it out, each tensor in one shard; returns the folder."""
    dcp.save(tensors, storage_writer=FileSystemWriter(folder), planner=DefaultSavePlanner(flatten_state_dict=False))
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": backend, "sharded_backend_version": 1}))
    return folder
