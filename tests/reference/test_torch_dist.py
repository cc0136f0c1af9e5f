"""Megatron's `torch_dist` checkpoints, saved and loaded by Megatron itself: what comes back is the same bytes."""

from __future__ import annotations

import filecmp
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_opd.cli import main
from nemo_opd.config import Config
from nemo_opd.engines.megatron import restricted
from tests.helpers.megatron import recipe
from tests.helpers.ranks import RankPool
from tests.helpers.tiny import tiny_checkpoint

VOCAB = 97


@dataclass(frozen=True)
class Saved:
    """How a checkpoint was made."""

    family: str
    tp: int = 1
    pp: int = 1
    ep: int = 1
    prefix: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    """What Megatron-LM and NeMo say to `sharded_state_dict`."""
    model: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32


NUMBERED, APART = {"non_homogeneous_layers": True}, {"singleton_local_shards": True}
CASES = {
    "qwen3, stacked, tp2": Saved("qwen3", tp=2),
    "qwen3, numbered, tied, tp2": Saved("qwen3", tp=2, metadata=NUMBERED, model={"tie_word_embeddings": True}),
    "qwen3, gate and up apart, tp2": Saved("qwen3", tp=2, metadata=APART, prefix="module."),
    "qwen2 with biases, tied, pp2": Saved("qwen2", pp=2, model={"tie_word_embeddings": True}, dtype=torch.bfloat16),
    "llama, tp2": Saved("llama", tp=2, prefix="model.", dtype=torch.bfloat16),
    "llama, numbered, pp2": Saved("llama", pp=2, metadata=NUMBERED),
    "qwen3-moe, stacked, tp2 ep2": Saved("qwen3_moe", tp=2, ep=2),
    "qwen3-moe, apart, tp2": Saved("qwen3_moe", tp=2, metadata=APART, model={"tie_word_embeddings": True}),
}


def built(rank: int, case: Saved, source: Path) -> Any:
    """(model, architecture) on the case's layout."""
    from nemo_opd.config import LayoutConfig
    from nemo_opd.engines.megatron import cpu, parallel
    from nemo_opd.engines.megatron.model import build_model

    cpu.install()
    parallel.destroy_student_groups()  # of an earlier test in this process
    layout = parallel.Layout(case.tp, case.pp, 1, rank, case.ep)
    groups = parallel.student_groups(layout, seed=0)
    config = LayoutConfig(sequence_parallel="moe" in case.family)
    return build_model(source, config, layout, groups, case.dtype, "student", 8)


def save_as_megatron(rank: int, cases: dict[str, tuple[Saved, Path, Path]]) -> None:
    """With Megatron's own `dist_checkpointing.save`, as a training script of Megatron-LM's does."""
    from megatron.core import dist_checkpointing

    from nemo_opd.engines.megatron import cpu

    for case, source, folder in cases.values():
        model, _ = built(rank, case, source)
        with cpu.megatron_device():
            metadata = {**case.metadata, "dp_cp_group": model.pg_collection.dp_cp}
            weights = model.chunks[0].sharded_state_dict(prefix=case.prefix, metadata=metadata)
            dist_checkpointing.save({"model": weights, "args": {"iteration": 7}}, str(folder))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, ranks2: RankPool) -> dict[str, tuple[Saved, Path, Path]]:
    """Case, Hugging Face folder, Megatron's folder."""
    root, cases = tmp_path_factory.mktemp("torch_dist"), {}
    for number, (name, case) in enumerate(CASES.items()):
        source = tiny_checkpoint(root / f"{number}-hf", case.family, number, case.dtype, vocab_size=VOCAB, **case.model)
        (root / f"{number}-megatron").mkdir()
        cases[name] = case, source, root / f"{number}-megatron"
    ranks2.run(save_as_megatron, cases)
    return cases


def without_weights(source: Path, folder: Path) -> Path:
    """The configuration and something of a tokenizer's."""
    folder.mkdir()
    shutil.copyfile(source / "config.json", folder / "config.json")
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("name", CASES)
def test_what_megatron_saved_is_imported_byte_for_byte(
    saved: dict[str, tuple[Saved, Path, Path]], tmp_path: Path, name: str
) -> None:
    _, source, megatron = saved[name]
    like = without_weights(source, tmp_path / "like")
    assert main(["import", str(megatron), str(tmp_path / "out"), "--like", str(like)]) == 0
    for file in ("model.safetensors", "config.json"):
        assert filecmp.cmp(source / file, tmp_path / "out" / file, shallow=False), file
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == "{}"


def test_the_padding_was_there(saved: dict[str, tuple[Saved, Path, Path]]) -> None:
    _, _, megatron = saved["qwen3, stacked, tp2"]
    found = restricted.read_metadata(megatron / ".metadata").state_dict_metadata["output_layer.weight"]
    assert found.size[0] == 112 > VOCAB


@pytest.mark.parametrize("form", ["megatron-lm", "nemo"])
def test_the_folder_around_it_is_found(saved: dict[str, tuple[Saved, Path, Path]], tmp_path: Path, form: str) -> None:
    _, source, megatron = saved["llama, tp2"]
    inner = {"megatron-lm": "iter_0000300", "nemo": "weights"}[form]
    shutil.copytree(megatron, tmp_path / "run" / inner)
    if form == "megatron-lm":
        (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("300\n")
    assert main(["import", str(tmp_path / "run"), str(tmp_path / "out"), "--like", str(source)]) == 0
    assert filecmp.cmp(source / "model.safetensors", tmp_path / "out" / "model.safetensors", shallow=False)


def test_another_dtype_on_request(saved: dict[str, tuple[Saved, Path, Path]], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    _, source, megatron = saved["qwen3, stacked, tp2"]
    arguments = ["import", str(megatron), str(tmp_path / "out"), "--like", str(source), "--dtype", "bfloat16"]
    assert main(arguments) == 0
    got, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", source))
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name].bfloat16()) for name in expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": 3}, ("shape (4, 32)", "(3, 32) from config.json")),
        ({"num_hidden_layers": 5}, ("shape (4, 32)", "(5, 32) from config.json")),
        ({"intermediate_size": 48}, ("linear_fc1.weight", "(4, 96, 32) from config.json")),
        ({"vocab_size": 113}, ("embedding.word_embeddings.weight", "shape (112, 32)", "(113, 32)")),
        ({"tie_word_embeddings": True}, ("tensor output_layer.weight", "only weights of Qwen3ForCausalLM")),
        ({"architectures": ["LlamaForCausalLM"]}, ("k_layernorm.weight and 1 more", "only weights of Llama")),
        ({"architectures": ["Qwen2ForCausalLM"]}, ("no tensor", "linear_qkv.bias")),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_name(
    saved: dict[str, tuple[Saved, Path, Path]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    words: tuple[str, ...],
) -> None:
    _, source, megatron = saved["qwen3, stacked, tp2"]
    like = without_weights(source, tmp_path / "like")
    config = json.loads((like / "config.json").read_text())
    (like / "config.json").write_text(json.dumps({**config, "layer_types": None, **change}))
    assert main(["import", str(megatron), str(tmp_path / "out"), "--like", str(like)]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert not (tmp_path / "out").exists()


def train_and_save(rank: int, config: Config, run: Path, exported: Path) -> None:
    """A checkpoint of a run, with an optimizer, and the same weights in Hugging Face format."""
    from nemo_opd.checkpoint.store import CheckpointStore, RunState
    from nemo_opd.configuration.load import recorded_yaml
    from nemo_opd.engines.megatron.weights import save_hf_checkpoint
    from nemo_opd.processes import Processes
    from tests.contract.trainers import batch_for, build

    trainer = build(config)
    trainer.train_step(batch_for(trainer.place, 0))
    CheckpointStore(run, Processes.current(), 2).save(trainer, RunState(step=1), recorded_yaml(config))
    save_hf_checkpoint(trainer.export_weights(), exported, config.student.model)


def load_as_megatron(rank: int, case: Saved, source: Path, folder: Path, out: Path) -> None:
    """With Megatron's own `dist_checkpointing.load` into a model whose weights were all forgotten."""
    from megatron.core import dist_checkpointing

    from nemo_opd.engines.megatron import cpu
    from nemo_opd.engines.megatron.weights import export_hf_weights, save_hf_checkpoint

    model, architecture = built(rank, case, source)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    with cpu.megatron_device():
        [chunk] = model.chunks
        wanted = {"model": chunk.sharded_state_dict(metadata={"dp_cp_group": chunk.pg_collection.dp_cp})}
        chunk.load_state_dict(dist_checkpointing.load(wanted, str(folder))["model"])
    save_hf_checkpoint(export_hf_weights(model, architecture), out, source)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_a_run_is_exported_for_megatron_and_imported_again(
    ranks2: RankPool, alone: Callable[..., Any], tmp_path: Path, family: str
) -> None:
    source = tiny_checkpoint(tmp_path / "source", family, vocab_size=91)
    settings = {"student__tensor_model_parallel_size": 2, "student__sequence_parallel": family == "qwen3_moe"}
    run, exported, out = tmp_path / "run", tmp_path / "exported", tmp_path / "megatron"
    ranks2.run(train_and_save, recipe(source, **settings), run, exported)
    assert not filecmp.cmp(source / "model.safetensors", exported / "model.safetensors", shallow=False)
    [checkpoint] = (run / "checkpoints").glob("step-*")
    assert alone(main, ["export", str(checkpoint), str(out), "--format", "torch_dist"]) == 0
    names = restricted.read_metadata(out / ".metadata").state_dict_metadata
    assert not any("optimizer" in name for name in names)
    norm = "pre_mlp_layernorm.weight" if family == "qwen3_moe" else "mlp.linear_fc1.layer_norm_weight"
    assert f"decoder.layers.{norm}" in names, "the name that Transformer Engine's layers have for it"

    for layout in ({"tp": 2}, {"pp": 2}):
        again = tmp_path / f"again-{next(iter(layout))}"
        ranks2.run(load_as_megatron, Saved(family, **layout), source, out, again)
        assert filecmp.cmp(exported / "model.safetensors", again / "model.safetensors", shallow=False), layout
    for number, folder in enumerate((out, checkpoint / "model")):  # the second one has an optimizer
        imported = tmp_path / f"imported-{number}"
        assert main(["import", str(folder), str(imported), "--like", str(source)]) == 0
        assert filecmp.cmp(exported / "model.safetensors", imported / "model.safetensors", shallow=False)
