"""A set of weights that goes through a folder arrives whole, or is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_opd.refit.folder import MANIFEST, BadWeights, check_folder, tensor_shapes, write_folder

WEIGHTS = {f"layer.{i}": torch.arange(12.0).reshape(3, 4) + i for i in range(5)} | {"head": torch.ones(2).bfloat16()}
SHAPES = {name: tuple(tensor.shape) for name, tensor in WEIGHTS.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "set"
    size = write_folder(WEIGHTS.items(), path, version=4, shard_bytes=90)
    assert size == sum(tensor.nbytes for tensor in WEIGHTS.values()) == 244
    return path


def test_what_is_written_is_read_whatever_the_shards(folder: Path) -> None:
    manifest = check_folder(folder, SHAPES)
    assert manifest.version == 4
    assert [spec.name for spec in manifest.tensors] == list(WEIGHTS)
    assert len(list(folder.glob("*.safetensors"))) == 3
    found = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in WEIGHTS.items())
    assert tensor_shapes(folder) == SHAPES


def test_a_buffer_that_is_used_again_does_not_change_what_was_sent(tmp_path: Path) -> None:
    buffer = torch.zeros(3)

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for number in range(3):
            yield f"tensor {number}", buffer.fill_(number)

    write_folder(stream(), tmp_path / "set", version=0)
    found = load_file(tmp_path / "set" / "model-00001.safetensors")
    assert {name: float(tensor[0]) for name, tensor in found.items()} == {f"tensor {n}": float(n) for n in range(3)}


def test_a_stream_that_breaks_off_leaves_no_manifest(tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield "layer.0", WEIGHTS["layer.0"]
        raise ConnectionError("the sender died")

    with pytest.raises(ConnectionError):
        write_folder(broken(), tmp_path / "set", version=0, shard_bytes=1)
    with pytest.raises(BadWeights, match="manifest"):
        check_folder(tmp_path / "set", SHAPES)


def test_a_folder_is_written_once(folder: Path) -> None:
    with pytest.raises(FileExistsError):
        write_folder(WEIGHTS.items(), folder, version=5)


def _flip(folder: Path) -> None:
    file = folder / "model-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def _other_shape(folder: Path) -> None:
    """The files and the manifest agree with one another, and not with the model."""
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    write_folder({**WEIGHTS, "head": torch.ones(3)}.items(), folder, version=4)


def _manifest_of_another_dtype(folder: Path) -> None:
    values = json.loads((folder / MANIFEST).read_text())
    values["weights"]["tensors"][0][2] = "float64"
    (folder / MANIFEST).write_text(json.dumps(values))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "manifest of text": lambda folder: (folder / MANIFEST).write_text("[1, 2") and None,
    "manifest without files": lambda folder: (folder / MANIFEST).write_text("{}") and None,
    "missing file": lambda folder: (folder / "model-00001.safetensors").unlink(),
    "file that nobody named": lambda folder: save_file({"x": torch.ones(1)}, folder / "more.safetensors"),
    "flipped bit": _flip,
    "another shape": _other_shape,
    "another dtype": _manifest_of_another_dtype,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused(folder: Path, damage: str) -> None:
    DAMAGES[damage](folder)
    with pytest.raises(BadWeights):
        check_folder(folder, SHAPES)


@pytest.mark.parametrize("shapes", [{**SHAPES, "one more": (1,)}, {"head": (2,)}], ids=["missing", "unknown"])
def test_other_names_than_the_models_are_refused(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(BadWeights, match="expected"):
        check_folder(folder, shapes)
