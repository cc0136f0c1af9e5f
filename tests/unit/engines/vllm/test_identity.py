"""A folder of weights has a name of its own."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from nemo_opd.engines.vllm.identity import weights_id


def test_other_weights_have_another_id(tmp_path: Path) -> None:
    assert weights_id(tmp_path) == ""
    weights = {"a": torch.zeros(3, 5), "b": torch.randn(100, 100)}
    save_file(weights, tmp_path / "model.safetensors")
    first = weights_id(tmp_path)
    save_file(weights, tmp_path / "model.safetensors")
    assert weights_id(tmp_path) == first != ""
    save_file({**weights, "b": weights["b"] + 1e-3}, tmp_path / "model.safetensors")
    second = weights_id(tmp_path)
    save_file({"a": weights["a"]}, tmp_path / "model.safetensors")  # smaller than what is read of it
    assert len({first, second, weights_id(tmp_path)}) == 3
