"""Tiny random checkpoints in Hugging Face format, one per supported model family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

FAMILIES = ("qwen3", "qwen2", "llama", "mistral", "qwen3_moe")


def tiny_config(family: str = "qwen3", **overrides: Any) -> Any:
    """A `transformers` configuration of a four-layer model with grouped-query attention (4 heads, 2 groups).

    `overrides` are fields of that configuration: ``tie_word_embeddings=True``, ``vocab_size=101``, ...
    """
    from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

    classes = {
        "qwen3": Qwen3Config,
        "qwen2": Qwen2Config,
        "llama": LlamaConfig,
        "mistral": MistralConfig,
        "qwen3_moe": Qwen3MoeConfig,
    }
    fields: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    if family == "qwen3":
        fields["head_dim"] = 16  # wider than hidden / heads, as in the small Qwen3 models
    if family == "qwen3_moe":
        fields |= {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
        fields |= {"norm_topk_prob": True}
    if family == "mistral":
        fields["head_dim"] = None  # transformers' default is a number, whatever hidden and heads
    return classes[family](**(fields | overrides))


def tiny_model(family: str = "qwen3", seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A random model whose every parameter matters: norms and biases are perturbed away from 1 and 0."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides))
        if family == "qwen3_moe":
            model.set_experts_implementation("eager")  # transformers' faster one knows no float64
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                else:
                    parameter.mul_(4.0)  # initialised at 0.02: logits of a random model would be almost flat
            embedding = model.get_input_embeddings()
            if embedding.padding_idx is not None:  # zeros there would meet the norm's epsilon and explode its gradient
                embedding.weight[embedding.padding_idx].normal_(std=0.08)
    return model.to(dtype).eval()


def tiny_checkpoint(
    folder: Path, family: str = "qwen3", seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> Path:
    """Save `tiny_model` with its config.json as safetensors into `folder`; returns the folder."""
    tiny_model(family, seed, dtype, **overrides).save_pretrained(folder)
    return Path(folder)
