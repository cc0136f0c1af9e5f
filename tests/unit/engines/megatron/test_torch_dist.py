"""What a `torch_dist` checkpoint may look like that no Megatron here writes, and what is refused."""

from __future__ import annotations

import filecmp
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nemo_opd.engines.megatron import restricted
from nemo_opd.engines.megatron.families import read_architecture
from nemo_opd.engines.megatron.hf_files import save_hf_checkpoint
from nemo_opd.engines.megatron.torch_dist import TorchDistWeights, weights_folder
from nemo_opd.errors import ConfigError
from tests.helpers.tiny import tiny_checkpoint
from tests.helpers.torch_dist import megatron_tensors, save_torch_dist


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    return {name: tiny_checkpoint(root / name, name, num_hidden_layers=3) for name in ("llama", "qwen3_moe")}


def weights(
    sources: dict[str, Path], tensors: dict[str, Tensor], folder: Path, family: str = "llama"
) -> TorchDistWeights:
    return TorchDistWeights(save_torch_dist(tensors, folder), read_architecture(sources[family]))


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_shards_that_span_layers_and_experts(sources: dict[str, Path], tmp_path: Path, family: str) -> None:
    """Also: norms before experts by the name of Megatron's local layers; an optimizer and empty extra states beside."""
    found = megatron_tensors(sources[family])
    found |= {
        f"{start}.exp_avg.{name}": found[name]
        for name in [*found]
        for start in ("optimizer.state", "chained_1.optimizer.state")
    }
    found["decoder.layers.mlp.linear_fc1._extra_state"] = torch.zeros(3, dtype=torch.uint8)
    save_hf_checkpoint(weights(sources, found, tmp_path / "in", family), tmp_path / "out", sources[family])
    assert filecmp.cmp(sources[family] / "model.safetensors", tmp_path / "out" / "model.safetensors", shallow=False)


def test_norms_by_the_names_of_local_layers(sources: dict[str, Path], tmp_path: Path) -> None:
    found = {
        name.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.").replace(
            "mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."
        ): tensor
        for name, tensor in megatron_tensors(sources["llama"]).items()
    }
    assert "decoder.layers.input_layernorm.weight" in found and "decoder.layers.pre_mlp_layernorm.weight" in found
    save_hf_checkpoint(weights(sources, found, tmp_path / "in"), tmp_path / "out", sources["llama"])
    assert filecmp.cmp(sources["llama"] / "model.safetensors", tmp_path / "out" / "model.safetensors", shallow=False)


def test_weights_of_several_dtypes_need_a_word(sources: dict[str, Path], tmp_path: Path) -> None:
    found = megatron_tensors(sources["llama"])
    found["output_layer.weight"] = found["output_layer.weight"].bfloat16()
    with pytest.raises(ConfigError, match=r"bfloat16 \(output_layer\.weight\); .* say which: --dtype"):
        weights(sources, found, tmp_path / "in")
    one = TorchDistWeights(tmp_path / "in", read_architecture(sources["llama"]), torch.bfloat16)
    assert {tensor.dtype for _, tensor in one} == {torch.bfloat16}


def test_weights_that_are_no_floating_point_numbers_are_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    found = megatron_tensors(sources["llama"])
    found["output_layer.weight"] = found["output_layer.weight"].to(torch.float8_e4m3fn)
    with pytest.raises(ConfigError, match=r"output_layer\.weight: got torch\.float8_e4m3fn"):
        weights(sources, found, tmp_path / "in")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("decoder.layers.mlp.router.expert_bias", r"tensor decoder\.layers\.mlp\.router\.expert_bias"),
        ("vision_model.conv1.weight", r"tensor vision_model\.conv1\.weight"),
        ("decoder.layers.7.mlp.linear_fc2.weight", r"tensor decoder\.layers\.7\.mlp"),
        ("average.embedding.word_embeddings.weight", r"2 tensors \.\.embedding"),
    ],
)
def test_what_the_model_has_no_place_for_is_refused_by_name(
    sources: dict[str, Path], tmp_path: Path, name: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        weights(sources, {**megatron_tensors(sources["llama"]), name: torch.zeros(3)}, tmp_path / "in")


def test_a_missing_weight_is_named(sources: dict[str, Path], tmp_path: Path) -> None:
    found = megatron_tensors(sources["llama"])
    del found["decoder.layers.mlp.linear_fc2.weight"]
    with pytest.raises(
        ConfigError, match=r"no tensor decoder\.layers\.0\.mlp\.linear_fc2\.weight or decoder\.layers\.mlp"
    ):
        weights(sources, found, tmp_path / "in")


def test_a_shard_that_is_nowhere_is_missed(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = restricted.read_metadata
    folder = save_torch_dist(megatron_tensors(sources["llama"]), tmp_path / "in")
    metadata = read(folder / ".metadata")
    index = next(index for index in metadata.storage_data if index.fqn == "output_layer.weight")
    del metadata.storage_data[index]
    monkeypatch.setattr(restricted, "read_metadata", lambda path: metadata)
    with pytest.raises(ConfigError, match=r"output_layer\.weight: got no place of the shard"):
        list(TorchDistWeights(folder, read_architecture(sources["llama"])))
    metadata.state_dict_metadata["output_layer.weight"].chunks.clear()
    with pytest.raises(ConfigError, match="got 0 of 3072 numbers"):
        list(TorchDistWeights(folder, read_architecture(sources["llama"])))


def test_too_many_shards_over_too_many_layers(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_torch_dist(megatron_tensors(sources["llama"]), tmp_path / "in")
    monkeypatch.setattr(restricted, "SHARDS", 16)  # enough to read it: 9 tensors, 6 of them with 3 layers
    with pytest.raises(ConfigError, match="too many shards"):
        TorchDistWeights(folder, read_architecture(sources["llama"]))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"sharded_backend": "zarr"}', r"sharded_backend: got 'zarr'; expected torch_dist"),
        ('{"sharded_backend": "fsdp_dtensor"}', "fsdp_dtensor"),
        ("[]", r"metadata\.json"),
        ("{", r"metadata\.json"),
        ("[" * 60000, r"metadata\.json"),
    ],
)
def test_another_format_is_refused(sources: dict[str, Path], tmp_path: Path, text: str, words: str) -> None:
    folder = save_torch_dist({"x": torch.zeros(1)}, tmp_path / "in")
    (folder / "metadata.json").write_text(text)
    with pytest.raises(ConfigError, match=words):
        weights_folder(folder)


def test_a_folder_without_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("../../etc")
    with pytest.raises(ConfigError, match=r"expected \.metadata of a torch_dist checkpoint"):
        weights_folder(tmp_path)
