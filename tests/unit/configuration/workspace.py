"""A folder with all that a recipe refers to, and a recipe that is right, to be broken one line at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SIZES: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "vocab_size": 96,
    "max_position_embeddings": 256,
}

RECIPE = """\
run: {dir: run}
student:
  model: student
teacher:
  model: teacher
data:
  path: train.jsonl
  max_prompt_tokens: 64
rollout:
  max_new_tokens: 64
train:
  steps: 10
"""


def make_workspace(folder: Path) -> Path:
    """Write models (their config.json), data and `recipe.yaml`; returns the recipe. Paths in it are relative."""
    write_model(folder / "student")
    write_model(folder / "teacher", num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=6)
    (folder / "train.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE)
    return recipe


def write_model(folder: Path, **changes: Any) -> None:
    """A config.json of the shape that `transformers` writes; a change to None leaves the field out."""
    folder.mkdir()
    values = {name: value for name, value in {**SIZES, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(values))
