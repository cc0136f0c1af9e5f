"""Loading by slices and writing folders, with every way in which a folder can be wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nemo_opd.engines.megatron import hf_files
from nemo_opd.engines.megatron.families import Architecture, padded_vocab_size, read_architecture
from nemo_opd.engines.megatron.hf_files import INDEX_FILE, SINGLE_FILE, HFTensors, save_hf_checkpoint
from nemo_opd.engines.megatron.sharding import local_shape
from nemo_opd.engines.megatron.tables import Weight
from nemo_opd.engines.megatron.weights import export_hf_weights, load_hf_weights, load_output_weight
from nemo_opd.errors import ConfigError
from tests.helpers.tiny import tiny_checkpoint, tiny_model

VOCAB = 37


@pytest.fixture
def qwen3(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "qwen3", "qwen3", vocab_size=VOCAB, num_hidden_layers=2)


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "tied", "qwen3", vocab_size=VOCAB, num_hidden_layers=2, tie_word_embeddings=True)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    model = tiny_model("qwen3", vocab_size=VOCAB, num_hidden_layers=2)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    return tmp_path / "sharded"


class _Group:
    """A process group that is only asked where this rank stands in it: loading does not communicate."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = (lambda: rank), (lambda: size)


def skeleton(
    architecture: Architecture, tp_rank: int = 0, tp_size: int = 1, layers: range | None = None, engine: bool = False
) -> nn.Module:
    """The parameters that a rank's GPTModel has, in a tree of modules, filled with NaN; nothing can be run.

    With `engine` under the names of the Transformer Engine spec, which cannot be built without CUDA.
    """
    layers = range(architecture.num_layers) if layers is None else layers
    padded = padded_vocab_size(architecture.vocab_size, 1, tp_size)
    root = nn.Module()
    for weight in architecture.weights():
        name, place = weight.names[-1] if engine else weight.megatron, _place(weight, architecture, layers)
        if place is not None and not weight.copy:
            name = name.replace(*place)
            value = nn.Parameter(torch.full(local_shape(weight, architecture, padded, tp_size), float("nan")))
            _put(root, name.split("."), value)
    for module, layer in zip(root.decoder.layers.children(), layers, strict=True):  # type: ignore[union-attr]
        module.layer_number = layer + 1  # type: ignore[assignment]
    root.vocab_size = padded  # type: ignore[assignment]
    root.pg_collection = SimpleNamespace(tp=_Group(tp_rank, tp_size), pp=_Group(0, 1))  # type: ignore[assignment]
    return root


def _place(weight: Weight, architecture: Architecture, layers: range) -> tuple[str, str] | None:
    """How the weight's name changes on a stage with these layers; None when another stage has it."""
    parts = weight.megatron.split(".")
    if parts[:2] == ["decoder", "layers"]:
        number = int(parts[2])
        return (f"layers.{number}.", f"layers.{number - layers.start}.") if number in layers else None
    first = parts[0] == "embedding"
    here = layers.start == 0 if first else layers.stop == architecture.num_layers
    return ("", "") if here else None


def _put(module: nn.Module, path: list[str], value: nn.Parameter) -> None:
    for name in path[:-1]:
        if not hasattr(module, name):
            module.add_module(name, nn.ModuleList() if name == "layers" else nn.Module())
        module = getattr(module, name)
    module.register_parameter(path[-1], value)


def test_both_layer_specs_are_filled_alike_and_exported_alike(qwen3: Path) -> None:
    architecture = read_architecture(qwen3)
    exports = []
    for engine in (False, True):
        model = skeleton(architecture, engine=engine)
        load_hf_weights(model, qwen3)
        assert any("layer_norm_weight" in name for name, _ in model.named_parameters()) is engine
        exports.append(dict(export_hf_weights(model, architecture)))
    source = load_file(qwen3 / SINGLE_FILE)
    for export in exports:
        assert export.keys() == source.keys()
        assert all(torch.equal(export[name], source[name]) for name in source)


def test_a_rank_reads_no_more_than_it_holds(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 of TP 2 on the second pipeline stage: one layer's half, nothing of the embedding."""
    read: list[int] = []
    plain = HFTensors.read

    def counting(self: HFTensors, *args: Any) -> Tensor:
        read.append((piece := plain(self, *args)).numel())
        return piece

    monkeypatch.setattr(HFTensors, "read", counting)
    architecture = read_architecture(sharded)
    model = skeleton(architecture, tp_rank=1, tp_size=2, layers=range(1, 2))
    load_hf_weights(model, sharded)
    padding = architecture.hidden_size  # one row: 37 is padded to 38
    assert sum(read) == sum(parameter.numel() for parameter in model.parameters()) - padding
    output = dict(model.named_parameters())["output_layer.weight"]
    source = {name: tensor for path in sharded.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert torch.equal(output[:-1], source["lm_head.weight"][19:]) and not output[-1].any()
    norm = dict(model.named_parameters())["decoder.layers.0.input_layernorm.weight"]
    assert torch.equal(norm, source["model.layers.1.input_layernorm.weight"]), "the stage's layer 0 is the model's 1"
    assert not any(parameter.isnan().any() for parameter in model.parameters())


def test_a_model_of_another_shape_or_kind_is_refused(qwen3: Path) -> None:
    architecture = read_architecture(qwen3)
    model = skeleton(architecture)
    model.decoder.final_layernorm.weight = nn.Parameter(torch.ones(5))  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"decoder\.final_layernorm\.weight: got shape \(5,\)"):
        load_hf_weights(model, qwen3)
    model = skeleton(architecture)
    model.router = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"router\.bias: got a parameter"):
        load_hf_weights(model, qwen3)
    model = skeleton(architecture, layers=range(1, 2))
    with pytest.raises(ValueError, match=r"word_embeddings\.weight: got a model in which no pipeline stage has it"):
        dict(export_hf_weights(model, architecture))


def _rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / SINGLE_FILE)
    change(tensors)
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"no tensor model\.norm\.weight"),
        (lambda t: t.update({"model.norm.bias": torch.ones(32)}), r"model\.safetensors: got tensor model\.norm\.bias"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(31)}),
            r"model\.safetensors: model\.norm\.weight: got shape \(31,\); expected \(32,\)",
        ),
    ],
)
def test_wrong_tensors_are_named_with_their_file(qwen3: Path, change: Any, message: str) -> None:
    _rewrite(qwen3, change)
    with pytest.raises(ConfigError, match=message):
        load_hf_weights(skeleton(read_architecture(qwen3)), qwen3)


@pytest.mark.parametrize(
    "file",
    ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "a\\b.safetensors", "model.bin", 3, ""],
)
def test_an_index_that_leads_elsewhere_is_refused(sharded: Path, file: object) -> None:
    shutil.copy(next(sharded.glob("*.safetensors")), sharded.parent / "secret.safetensors")
    index = json.loads((sharded / INDEX_FILE).read_text())
    index["weight_map"]["model.norm.weight"] = file
    (sharded / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"index\.json: model\.norm\.weight"):
        HFTensors(sharded)


def test_an_index_and_files_that_disagree(sharded: Path) -> None:
    index = json.loads((sharded / INDEX_FILE).read_text())
    last = index["weight_map"]["lm_head.weight"]
    other = next(file for file in index["weight_map"].values() if file != last)
    text = json.dumps(index | {"weight_map": index["weight_map"] | {"lm_head.weight": other}})
    (sharded / INDEX_FILE).write_text(text)
    with pytest.raises(ConfigError, match=rf"{other}: lm_head\.weight"):
        load_output_weight(sharded, 0, 1)
    (sharded / other).write_bytes((sharded / other).read_bytes()[:100])
    with pytest.raises(ConfigError, match="complete safetensors file"):
        load_output_weight(sharded, 0, 1)
    (sharded / other).unlink()
    with pytest.raises(ConfigError, match=other):
        load_output_weight(sharded, 0, 1)
    for text in ("{", "[]", "{}"):
        (sharded / INDEX_FILE).write_text(text)
        with pytest.raises(ConfigError, match=r"index\.json"):
            load_output_weight(sharded, 0, 1)


def test_pickled_weights_are_not_read(qwen3: Path) -> None:
    (qwen3 / SINGLE_FILE).rename(qwen3 / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="no safetensors"):
        load_hf_weights(skeleton(read_architecture(qwen3)), qwen3)


def test_a_stored_copy_of_tied_embeddings(tied: Path) -> None:
    architecture = read_architecture(tied)
    _rewrite(tied, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    model = skeleton(architecture)
    load_hf_weights(model, tied)
    assert "lm_head.weight" not in dict(export_hf_weights(model, architecture))
    _rewrite(tied, lambda t: t["lm_head.weight"][-1].add_(1))
    with pytest.raises(ConfigError, match=r"lm_head\.weight: got a tensor that differs"):
        load_hf_weights(model, tied)


@pytest.mark.parametrize(("folder", "name"), [("qwen3", "lm_head.weight"), ("tied", "model.embed_tokens.weight")])
def test_output_rows(request: pytest.FixtureRequest, folder: str, name: str) -> None:
    path = request.getfixturevalue(folder)
    whole = load_file(path / SINGLE_FILE)[name]
    assert torch.equal(load_output_weight(path, 3, 10), whole[3:13])
    rows = load_output_weight(path, 30, 10, dtype=torch.float64)
    assert rows.dtype == torch.float64 and torch.equal(rows[:7], whole[30:].double()) and not rows[7:].any()
    assert not load_output_weight(path, 40, 5).any()
    fewer = load_output_weight(path, 30, 7, vocab_size=32)
    assert torch.equal(fewer[:2], whole[30:32]) and not fewer[2:].any()
    with pytest.raises(ConfigError, match="at least 38"):
        load_output_weight(path, 0, 38, vocab_size=38)


def _stream(folder: Path, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    architecture = read_architecture(folder)
    model = skeleton(architecture)
    load_hf_weights(model, folder)
    return export_hf_weights(model, architecture, dtype=dtype)


def test_large_models_are_split_and_transformers_reads_them(qwen3: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    (qwen3 / "tokenizer.json").write_text("{}")
    (qwen3 / "notes.txt").write_text("not part of a model")
    save_hf_checkpoint(_stream(qwen3), tmp_path / "out", qwen3, max_shard_bytes=30_000)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "out" / INDEX_FILE).read_text())
    source = load_file(qwen3 / SINGLE_FILE)
    assert index["metadata"]["total_size"] == sum(tensor.numel() * 4 for tensor in source.values())
    for file in files:
        shard = load_file(tmp_path / "out" / file)
        assert sum(tensor.numel() * 4 for tensor in shard.values()) <= 30_000 and shard
    assert (tmp_path / "out" / "tokenizer.json").is_file() and not (tmp_path / "out" / "notes.txt").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(model.state_dict()[name], source[name]) for name in source)


def test_at_most_one_shard_is_held(qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    save = hf_files.save_file

    def counting(tensors: dict[str, Tensor], *args: Any, **kwargs: Any) -> None:
        written.append(taken)
        save(tensors, *args, **kwargs)

    monkeypatch.setattr(hf_files, "save_file", counting)
    taken = 0

    def stream() -> Iterator[tuple[str, Tensor]]:
        nonlocal taken
        for name, tensor in _stream(qwen3):
            taken += tensor.numel() * 4
            yield name, tensor

    save_hf_checkpoint(stream(), tmp_path / "out", qwen3, max_shard_bytes=30_000)
    held = [after - before for before, after in zip([0, *written], written, strict=False)]
    assert len(held) > 2 and max(held) <= 30_000


def test_another_dtype_is_written_into_the_configuration(qwen3: Path, tmp_path: Path) -> None:
    save_hf_checkpoint(_stream(qwen3, torch.bfloat16), tmp_path / "out", qwen3)
    config, before = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", qwen3))
    assert config == {**before, "dtype": "bfloat16"} and before["dtype"] == "float32"
    written, source = load_file(tmp_path / "out" / SINGLE_FILE), load_file(qwen3 / SINGLE_FILE)
    assert all(torch.equal(written[name], source[name].bfloat16()) for name in source)


def test_a_folder_is_never_overwritten_nor_left_half_written(qwen3: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    drawn: list[str] = []

    def stream(wrong: str) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in _stream(qwen3):
            drawn.append(name)
            if name == "model.norm.weight" and wrong == "ended early":
                return
            yield name, tensor[1:] if name == "model.norm.weight" and wrong == "shape" else tensor
            if name == "model.norm.weight" and wrong == "repeated":
                yield name, tensor

    for wrong, message in (("shape", "model.norm.weight"), ("repeated", "any more"), ("ended early", "ended without")):
        drawn.clear()
        with pytest.raises(ValueError, match=message):
            save_hf_checkpoint(stream(wrong), out, qwen3)
        assert list(out.parent.iterdir()) == [], "nothing is left behind"
        assert wrong == "ended early" or drawn[-1] == "lm_head.weight", "the stream is exhausted for the other ranks"
    out.mkdir()
    save_hf_checkpoint(_stream(qwen3), out, qwen3)
    before = sorted(path.stat().st_mtime_ns for path in out.iterdir())
    with pytest.raises(ConfigError, match="choose another folder"):
        save_hf_checkpoint(_stream(qwen3), out, qwen3)
    assert sorted(path.stat().st_mtime_ns for path in out.iterdir()) == before


def test_ranks_that_do_not_write_exhaust_the_stream(qwen3: Path, tmp_path: Path) -> None:
    stream = _stream(qwen3)
    save_hf_checkpoint(stream, tmp_path / "out", qwen3, writes=False)
    assert next(stream, None) is None and not (tmp_path / "out").exists()
    save_hf_checkpoint(_stream(qwen3), tmp_path / "out", qwen3)
    late = _stream(qwen3)  # a slower replica finds the folder finished: nothing is wrong with that
    save_hf_checkpoint(late, tmp_path / "out", qwen3, writes=False)
    assert next(late, None) is None
