"""Randomly initialised checkpoints in Hugging Face format: where training from scratch begins."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_opd.errors import ConfigError

FAMILIES = ("qwen3", "qwen2", "llama")


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a dense decoder. `heads` divides `hidden_size` unless `head_dim` is set; `kv_heads` divides `heads`."""

    hidden_size: int = 96
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    ffn: int = 256
    """Width of the gated feed-forward layer."""
    head_dim: int | None = None
    """Width of a head; None: ``hidden_size / heads``. vLLM's attention on CPU wants 32 or more."""

    @property
    def head_width(self) -> int:
        return self.head_dim or self.hidden_size // self.heads

    def __post_init__(self) -> None:
        if min(self.hidden_size, self.layers, self.heads, self.kv_heads, self.ffn, self.head_width) < 1:
            raise ConfigError("model sizes", self, "positive sizes", "raise the one below 1")
        if (self.head_dim is None and self.hidden_size % self.heads) or self.head_width % 2:
            raise ConfigError(
                "hidden_size", f"{self.hidden_size} for {self.heads} heads", "an even width per head",
                f"use a multiple of {2 * self.heads}, or set head_dim",
            )  # fmt: skip
        if self.heads % self.kv_heads:
            raise ConfigError(
                "kv_heads",
                f"{self.kv_heads} for {self.heads} heads",
                f"a divisor of {self.heads}",
                "change one of them",
            )


def write_random_model(
    folder: str | Path,
    tokenizer_folder: str | Path,
    family: str = "qwen3",
    shape: ModelShape | None = None,
    seed: int = 0,
    tie: bool = False,
    vocab_size: int | None = None,
    max_positions: int = 512,
) -> int:
    """Save a randomly initialised float32 checkpoint with its tokenizer's files beside it.

    Args:
        folder: made when absent.
        tokenizer_folder: a tokenizer in Hugging Face format; its files are copied.
        family: one of FAMILIES.
        seed: of the initialisation; the caller's random state is left as it was.
        tie: share the input embedding with the output layer.
        vocab_size: None for the tokenizer's length; larger values give rows that no token uses, as in real models.

    Returns:
        The number of parameters.

    Raises:
        ConfigError: sizes that do not fit together, unknown family, or a vocabulary smaller than the tokenizer's.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from nemo_opd.prompts.template import load_tokenizer

    folder, tokenizer_folder = Path(folder), Path(tokenizer_folder)
    tokenizer = load_tokenizer(tokenizer_folder, key="tokenizer")
    vocab_size = len(tokenizer) if vocab_size is None else vocab_size
    if vocab_size < len(tokenizer):
        raise ConfigError("vocab_size", vocab_size, f"at least the tokenizer's {len(tokenizer)}", "raise it")
    config = _config(family, shape or ModelShape(), vocab_size, tie, max_positions, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        if (tokenizer_folder / name).is_file() and tokenizer_folder.resolve() != folder.resolve():
            shutil.copyfile(tokenizer_folder / name, folder / name)
    return sum(parameter.numel() for parameter in model.parameters())


def _config(family: str, shape: ModelShape, vocab_size: int, tie: bool, max_positions: int, tokenizer: Any) -> Any:
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config

    kinds = dict(zip(FAMILIES, (Qwen3Config, Qwen2Config, LlamaConfig), strict=True))
    if family not in kinds:
        raise ConfigError("family", family, f"one of {FAMILIES}", "choose one of them")
    if family == "qwen2" and shape.head_width * shape.heads != shape.hidden_size:
        raise ConfigError(
            "head_dim", shape.head_dim, "nothing with family qwen2, which has no such field", "leave it out"
        )
    more = {} if family == "qwen2" else {"head_dim": shape.head_width}
    return kinds[family](
        vocab_size=vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.ffn,
        max_position_embeddings=max_positions,
        tie_word_embeddings=tie,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **more,
    )
