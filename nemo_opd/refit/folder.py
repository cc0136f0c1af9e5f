"""A set of weights as a folder: safetensors files and `manifest.json`, which is written last and names every byte.

Through shared memory or a shared file system it reaches servers on this node or on others. A reader believes nothing
that the manifest does not say: names, shapes, dtypes and the SHA-256 of every file are checked before a weight is used.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nemo_opd.engines.protocols import NamedTensor
from nemo_opd.refit.manifest import Manifest, TensorSpec, WeightCheck

MANIFEST = "manifest.json"
SHARD_BYTES = 2 << 30
"""Bytes of one file, about: what is held in memory while it is written."""


class BadWeights(ValueError):
    """A folder that does not hold the set of weights that it should."""


def write_folder(weights: Iterable[NamedTensor], folder: Path, version: int, shard_bytes: int = SHARD_BYTES) -> int:
    """Write `weights` into the new folder `folder`; returns their bytes.

    Raises OSError where it cannot be written (the folder is then incomplete, and without a manifest), and whatever
    `weights` raises.
    """
    folder.mkdir(parents=True)
    files: dict[str, str] = {}
    specs: list[TensorSpec] = []
    total = 0
    for shard in _shards(weights, shard_bytes):
        name = f"model-{len(files) + 1:05d}.safetensors"
        save_file(shard, folder / name)
        files[name] = _digest(folder / name)
        specs += [TensorSpec.of(tensor_name, tensor) for tensor_name, tensor in shard.items()]
        total += sum(tensor.nbytes for tensor in shard.values())
    text = json.dumps({"files": files, "weights": json.loads(Manifest(version, tuple(specs)).to_json())})
    unfinished = folder / f"{MANIFEST}.tmp"
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(folder / MANIFEST)
    return total


def _shards(weights: Iterable[NamedTensor], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in weights:
        # A copy: the sender may use its buffer again, and safetensors refuses tensors that share memory.
        shard[name] = tensor.detach().cpu().clone().contiguous()
        size += tensor.nbytes
        if size >= shard_bytes:
            yield shard
            shard, size = {}, 0
    if shard:
        yield shard


def check_folder(folder: Path, expected: Mapping[str, tuple[int, ...]]) -> Manifest:
    """What `folder` holds, after every file was read and compared with the manifest.

    Args:
        expected: shape of every tensor by name.

    Raises:
        BadWeights: no manifest, a file that is missing, of another content or not named, tensors other than expected.
    """
    try:
        values: Any = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files, manifest = dict(values["files"]), Manifest.from_json(json.dumps(values["weights"]))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BadWeights(f"{folder / MANIFEST}: {error}; expected what write_folder writes last") from error
    found = {path.name for path in folder.iterdir()} - {MANIFEST}
    if found != set(files):
        raise BadWeights(f"{folder}: got files {sorted(found)}; expected {sorted(files)}")
    for name, digest in files.items():
        if _digest(folder / name) != digest:
            raise BadWeights(f"{folder / name}: got other bytes than were written; expected SHA-256 {digest}")
    check = WeightCheck(expected)
    listed = {spec.name: spec for spec in manifest.tensors}
    try:
        for name, spec in _specs_in(folder, files):
            if listed.get(name) != spec:
                raise BadWeights(f"{folder}: got {spec}; expected {listed.get(name)}")
            check.see(name, spec.meta())
        check.finish()
    except ValueError as error:
        raise BadWeights(f"{folder}: {error}") from error
    return manifest


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor by name in the safetensors files of a model folder; only their headers are read."""
    names = [path.name for path in sorted(folder.glob("*.safetensors"))]
    return {name: spec.shape for name, spec in _specs_in(folder, names)}


_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def _specs_in(folder: Path, files: Iterable[str]) -> Iterator[tuple[str, TensorSpec]]:
    for file in files:
        with safe_open(folder / file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                header = tensors.get_slice(name)
                dtype = _DTYPES.get(header.get_dtype(), header.get_dtype())
                yield name, TensorSpec(name, tuple(header.get_shape()), dtype)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
