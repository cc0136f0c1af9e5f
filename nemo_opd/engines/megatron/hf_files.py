"""Folders in Hugging Face format: reading slices of their tensors, writing them shard by shard.

Safetensors only: the format holds tensors and nothing that could be executed.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nemo_opd.engines.megatron.families import Architecture, read_architecture, read_hf_config
from nemo_opd.errors import ConfigError
from nemo_opd.foreign import without_doubles

log = logging.getLogger(__name__)

SINGLE_FILE = "model.safetensors"
_NAME_LENGTH = 255
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
"""The size at which `transformers` splits too."""

COMPANION_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""What an exported model takes over from its source as it is, where it is there."""


class HFTensors:
    """The tensors of a Hugging Face folder, by name; nothing is read before it is asked for.

    Raises:
        ConfigError: no safetensors, an index that leads out of the folder, a file that is missing or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        self._open: dict[str, Any] = {}
        if self.index is not None:
            self._file_of = dict(self.index["weight_map"])
        elif (self.folder / SINGLE_FILE).is_file():
            self._file_of = dict.fromkeys(self._handle(SINGLE_FILE).keys(), SINGLE_FILE)
        else:
            expected = f"{SINGLE_FILE} or {INDEX_FILE}"
            way_out = "save the model as safetensors: pickled .bin and .pt files can run code and are not read"
            raise ConfigError(str(self.folder), "no safetensors", expected, way_out)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._file_of)

    def path(self, name: str) -> Path:
        """The file that holds tensor `name`."""
        return self.folder / self._file_of[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, start: int, length: int, dim: int = 0) -> Tensor:
        """``tensor[start : start + length]`` along `dim`, on the CPU, without reading the rest."""
        piece = self._slice(name)
        return piece[start : start + length] if dim == 0 else piece[:, start : start + length]

    def _slice(self, name: str) -> Any:
        try:
            return self._handle(self._file_of[name]).get_slice(name)
        except SafetensorError as error:
            key = f"{self.path(name)}: {name}"
            raise ConfigError(key, error, f"the tensor that {INDEX_FILE} puts there", "copy the model again") from error

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            path = self.folder / file
            try:
                self._open[file] = safe_open(str(path), framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise ConfigError(str(path), error, "a complete safetensors file", "copy the model again") from error
        return self._open[file]


def read_index(folder: Path) -> dict[str, Any] | None:
    """The parsed index of a sharded checkpoint; None where there is none.

    Raises:
        ConfigError: it is not an index, or names a file that is not a safetensors file of this very folder.
    """
    path = folder / INDEX_FILE
    if not path.is_file():
        return None
    way_out = "copy the model again"
    try:
        index = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=without_doubles)
    except (ValueError, RecursionError) as error:
        raise ConfigError(str(path), error, "JSON that says everything once", way_out) from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(str(path), "no weight_map", "a map from tensor names to files", way_out)
    for name, file in weight_map.items():
        plain = isinstance(file, str) and file == os.path.basename(file) and "\\" not in file and "\0" not in file
        if not plain or not file.endswith(".safetensors") or len(file) > _NAME_LENGTH:
            expected = "the name of a .safetensors file in the same folder"
            raise ConfigError(
                f"{path}: {name}", repr(file), expected, "do not use this checkpoint: its index is unsafe"
            )
    return index


def check_tensors(tensors: HFTensors, architecture: Architecture) -> None:
    """Compare all names and shapes with what config.json implies; reads headers only.

    Raises:
        ConfigError: a tensor is missing, unknown or of another shape; names the tensor and the file.
    """
    expected = architecture.hf_tensors()
    way_out = "check that config.json and weights belong to the same model, and that the copy is complete"
    missing = sorted(expected.keys() - tensors.names)
    if missing:
        raise ConfigError(str(tensors.folder), f"no tensor {_some(missing)}", "every weight of config.json", way_out)
    unknown = sorted(tensors.names - expected.keys() - architecture.redundant_hf_names())
    if unknown:
        what = f"only tensors of {architecture.family.architecture}"
        raise ConfigError(str(tensors.path(unknown[0])), f"tensor {_some(unknown)}", what, way_out)
    for name, shape in expected.items():
        if tensors.shape(name) != shape:
            raise ConfigError(f"{tensors.path(name)}: {name}", f"shape {tensors.shape(name)}", f"{shape}", way_out)


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def save_hf_checkpoint(
    named_tensors: Iterable[tuple[str, Tensor]],
    folder: str | Path,
    source: str | Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    writes: bool | None = None,
) -> None:
    """Write a Hugging Face folder from a stream of whole tensors. Collective when the stream is.

    Every rank exhausts the stream; one of them writes, and holds at most one shard (a shard whose tensors arrive
    between another's is held as well). Written beside `folder` and renamed at the end, so `folder` is there complete or
    not at all. If writing fails, the rank that writes raises and the others do not; the stream is exhausted first, so
    that none is left waiting.

    Args:
        named_tensors: every tensor of the architecture once, under its Hugging Face name, all of one dtype.
        folder: does not exist yet, or is empty.
        source: the folder that the model came from. It gives config.json (with `dtype` brought up to date), generation
            configuration and tokenizer, and its index, where it has one, says which tensor goes into which file.
        max_shard_bytes: where the source has no index, the size above which files are split.
        writes: whether this rank writes; None: global rank 0, or the only process.

    Raises:
        ConfigError: `folder` holds something, or `source` is not a supported model.
        ValueError: a tensor is missing, unknown, repeated or of another shape.
    """
    if writes is None:
        writes = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    stream = iter(named_tensors)
    try:
        if writes:
            _write_folder(stream, Path(folder), Path(source), max_shard_bytes)
    finally:
        for _ in stream:
            pass


def _write_folder(stream: Iterator[tuple[str, Tensor]], folder: Path, source: Path, max_shard_bytes: int) -> None:
    # Only the rank that writes looks: to a slower replica the finished folder would seem to have been there before.
    with whole_folder(folder) as unfinished:
        writer = _ShardWriter(unfinished, read_architecture(source), read_index(source), max_shard_bytes)
        for name, tensor in stream:
            writer.add(name, tensor)
        writer.finish()
        assert writer.dtype is not None, "a model without tensors"
        _copy_companions(source, unfinished, writer.dtype)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write files into, which takes its place when all of them are on the disk: it is there
    complete or not at all.

    Raises:
        ConfigError: `folder` holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(str(folder), "something that exists", "a new or empty folder", "choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}.unfinished-{os.getpid()}")
    unfinished.mkdir()
    try:
        yield unfinished
        for path in (*unfinished.iterdir(), unfinished):
            _sync(path)
        if folder.exists():
            folder.rmdir()  # empty, as checked above
        unfinished.rename(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    log.info("wrote %s", folder)


class _ShardWriter:
    """Collects tensors until a file's worth is there, writes the file, forgets them."""

    def __init__(
        self, folder: Path, architecture: Architecture, source_index: Mapping[str, Any] | None, max_shard_bytes: int
    ) -> None:
        self._folder = folder
        self._missing = architecture.hf_tensors()
        self._source_index = source_index
        self._max_shard_bytes = max_shard_bytes
        self._file_of: dict[str, str] = {}
        self._expected: dict[str, int] = {}
        self._pending: dict[str, dict[str, Tensor]] = {}
        self._bytes = self._parameters = 0
        self.dtype: torch.dtype | None = None

    def add(self, name: str, tensor: Tensor) -> None:
        if self.dtype is None:
            self.dtype = tensor.dtype
            self._plan(tensor.element_size())
        shape = self._missing.pop(name, None)
        if shape is None or tuple(tensor.shape) != shape or tensor.dtype != self.dtype:
            got = f"{tuple(tensor.shape)} {tensor.dtype}"
            want = "no such tensor (any more)" if shape is None else f"{shape} {self.dtype}"
            raise ValueError(
                f"{name}: got {got}; expected {want}; export all weights of "
                "the model that the source folder describes, in one dtype"
            )
        self._bytes += tensor.numel() * tensor.element_size()
        self._parameters += tensor.numel()
        file = self._file_of[name]
        shard = self._pending.setdefault(file, {})
        shard[name] = tensor.detach().cpu().contiguous()
        if len(shard) == self._expected[file]:
            save_file(self._pending.pop(file), self._folder / file, metadata={"format": "pt"})

    def finish(self) -> None:
        """Check that everything came, and write the index if there are several files."""
        if self._missing:
            raise ValueError(f"the stream ended without {_some(sorted(self._missing))}; export every weight")
        assert not self._pending
        if self._source_index is None and len(self._expected) == 1:
            return
        totals = {"total_size": self._bytes, "total_parameters": self._parameters}
        old = (self._source_index or {}).get("metadata") or {}
        metadata = {**totals, **old, "total_size": self._bytes}
        if old:  # the number of parameters stays what the source says; older indices do not have it
            metadata = {key: value for key, value in metadata.items() if key in old or key == "total_size"}
        index = {"metadata": metadata, "weight_map": self._file_of}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (self._folder / INDEX_FILE).write_text(text, encoding="utf-8")

    def _plan(self, element_size: int) -> None:
        names = self._missing.keys()
        if self._source_index is not None:
            source = self._source_index["weight_map"]
            absent = sorted(names - source.keys())
            if absent:
                raise ValueError(
                    f"the source's {INDEX_FILE} does not know {_some(absent)}; give the model's own source"
                )
            self._file_of = {name: source[name] for name in names}
        else:
            self._file_of = _fill_files(self._missing, element_size, self._max_shard_bytes)
        for file in self._file_of.values():
            self._expected[file] = self._expected.get(file, 0) + 1


def _fill_files(shapes: Mapping[str, tuple[int, ...]], element_size: int, max_bytes: int) -> dict[str, str]:
    """Files filled in order, each up to `max_bytes` (a larger tensor has a file to itself); by name of the tensor."""
    number_of: dict[str, int] = {}
    number, filled = 1, 0
    for name, shape in shapes.items():
        size = element_size * int(torch.Size(shape).numel())
        if filled and filled + size > max_bytes:
            number, filled = number + 1, 0
        number_of[name] = number
        filled += size
    if number == 1:
        return dict.fromkeys(shapes, SINGLE_FILE)
    return {name: f"model-{i:05d}-of-{number:05d}.safetensors" for name, i in number_of.items()}


def _copy_companions(source: Path, folder: Path, dtype: torch.dtype) -> None:
    for name in COMPANION_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    config = read_hf_config(source)
    written = str(dtype).removeprefix("torch.")
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    if config.get(key) == written:
        shutil.copyfile(source / "config.json", folder / "config.json")
    else:
        text = json.dumps({**config, key: written}, indent=2) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")


def _sync(path: Path) -> None:
    """Have the operating system put a file's, or a folder's, content on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
