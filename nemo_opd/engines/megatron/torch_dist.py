"""A GPT model's weights in a `torch_dist` checkpoint of Megatron-LM, Megatron Bridge or NeMo, under Hugging Face names.

Nothing is built and no other process is needed: `.metadata` says where the shards of every tensor lie, and one weight
after the other is put together from them, whatever the layout that wrote it. Such a folder has no manifest of ours:
what is pickled in it is read by `restricted` alone, and `common.pt`, which holds no weights, is not opened.

Names are those of `GPTModel.sharded_state_dict()`, after a prefix that all share (none, ``module.``, ...):

* layers numbered (``decoder.layers.3.mlp.linear_fc2.weight``) or on top of each other, with the layer as first
  dimension (``decoder.layers.mlp.linear_fc2.weight``); experts likewise below ``mlp.experts.experts.``;
* norms by Transformer Engine's names, which Megatron's local layers use here too, or by their own;
* gate and up in one tensor, or in two (``weight_w``, ``weight_v``).
"""

from __future__ import annotations

import itertools
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from nemo_opd.engines.megatron import restricted
from nemo_opd.engines.megatron.families import Architecture
from nemo_opd.engines.megatron.sharding import local_shape, pieces_of
from nemo_opd.engines.megatron.tables import Shard, Weight
from nemo_opd.engines.protocols import NamedTensor
from nemo_opd.errors import ConfigError

_METADATA, _FORMAT = ".metadata", "metadata.json"
_TRACKER, _NEMO = "latest_checkpointed_iteration.txt", "weights"
_EMBEDDING = "embedding.word_embeddings.weight"
_OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.+)")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_ALSO = {"pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight"}
"""What Megatron's local layers call the norm before the MLP, before experts too."""
_WAY_OUT = "check that --like has the config.json of the model that was trained"


@dataclass(frozen=True)
class _Place:
    """A weight, or a half of it, in the checkpoint."""

    key: str
    """Of a tensor of the checkpoint, without the prefix."""
    shape: tuple[int, ...]
    """Without the padding of a vocabulary."""
    index: tuple[int, ...] = ()
    """Layer and expert, where they are leading dimensions of the tensor."""
    counts: tuple[int, ...] = ()
    """Sizes of these dimensions."""

    def halves(self) -> list[_Place]:
        """Gate and up, where they are stored apart."""
        shape = (self.shape[0] // 2, *self.shape[1:])
        return [replace(self, key=f"{self.key}_{half}", shape=shape) for half in "wv"]


def weights_folder(path: Path) -> Path:
    """The folder with the shards: `path` itself, the last iteration of a Megatron-LM folder, `weights` of a NeMo one.

    Raises:
        ConfigError: none of them, or shards in another format.
    """
    folders = [path, path / _NEMO, *_last_iteration(path)]
    folder = next((folder for folder in folders if (folder / _METADATA).is_file()), None)
    if folder is None:
        expected = f"{_METADATA} of a torch_dist checkpoint in it, in its {_NEMO}/ or in its last iteration"
        way_out = "name the folder with the .distcp files; convert other formats with Megatron's own tools first"
        raise ConfigError(str(path), "no such file", expected, way_out)
    try:
        text = (folder / _FORMAT).read_bytes()[: 1 << 16].decode()
        backend = json.loads(text).get("sharded_backend")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        way_out = "copy the checkpoint again"
        raise ConfigError(str(folder / _FORMAT), error, "the format that Megatron notes there", way_out) from error
    if backend != "torch_dist":
        way_out = "load it with the Megatron that wrote it, and save it as torch_dist"
        raise ConfigError(f"{folder / _FORMAT}: sharded_backend", repr(backend)[:80], "torch_dist", way_out)
    return folder


def _last_iteration(path: Path) -> list[Path]:
    try:
        text = (path / _TRACKER).read_bytes()[:32].decode().strip()
    except (OSError, ValueError):
        return []
    return [path / (f"iter_{int(text):07d}" if text.isdecimal() else "release")]


class TorchDistWeights:
    """All weights of `architecture` in a checkpoint's folder (see `weights_folder`).

    Making one reads `.metadata` and compares every name, shape and dtype with config.json.

    Raises:
        ConfigError: a file that is none of Megatron's, a tensor that is missing, unknown or of another shape, weights
            in several dtypes where no `dtype` is given to convert to.
    """

    def __init__(self, folder: Path, architecture: Architecture, dtype: torch.dtype | None = None) -> None:
        self._folder, self._architecture, self._dtype = folder, architecture, dtype
        metadata = restricted.read_metadata(folder / _METADATA)
        self._tensors = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not _OPTIMIZER.match(key) and "_extra_state" not in key
        }
        self._where = metadata.storage_data
        self._prefix = self._shared_prefix()
        self._places = {weight: self._find(weight) for weight in architecture.weights() if not weight.copy}
        self._refuse_unknown()
        self._refuse_odd_dtypes()
        self._chunks = self._chunks_by_index()

    def __iter__(self) -> Iterator[NamedTensor]:
        """Hugging Face names and whole tensors, in the order of the layers; one Megatron parameter at a time."""
        for weight, places in self._places.items():
            whole = torch.cat([self._read(place) for place in places])
            pieces = pieces_of(weight, self._architecture, self._architecture.vocab_size, 0, 1)
            for number, tensor in enumerate(weight.hf):
                parts = [whole.narrow(p.dim, p.offset, p.length) for p in pieces if p.tensor == number]
                yield tensor.name, torch.cat(parts).to(self._dtype or whole.dtype)

    def _shared_prefix(self) -> str:
        found = [key.removesuffix(_EMBEDDING) for key in self._tensors if key.endswith(_EMBEDDING)]
        if len(found) == 1:
            return found[0]
        got = f"{len(found)} tensors ..{_EMBEDDING}" if found else f"no tensor ..{_EMBEDDING}"
        raise ConfigError(str(self._folder), got, "one language model", "use a checkpoint of a GPT model alone")

    def _find(self, weight: Weight) -> list[_Place]:
        """Where it lies. Raises ConfigError when it is nowhere, or has another shape."""
        names = list(_names(weight, self._architecture))
        for name in names:
            for places in ([name], name.halves() if weight.shard is Shard.GATE_UP else [name]):
                if all(self._prefix + place.key in self._tensors for place in places):
                    for place in places:
                        self._check_shape(place, weight.shard is Shard.VOCAB)
                    return places
        keys = " or ".join(dict.fromkeys(name.key for name in names))
        raise ConfigError(str(self._folder), f"no tensor {self._prefix}{keys}", "all weights of config.json", _WAY_OUT)

    def _check_shape(self, place: _Place, vocabulary: bool) -> None:
        """A vocabulary may have more rows: what Megatron pads it with."""
        expected, got = (*place.counts, *place.shape), tuple(self._tensors[self._prefix + place.key].size)
        padded = vocabulary and got[1:] == expected[1:] and got[0] > expected[0]
        if got != expected and not padded:
            key = f"{self._folder}: {self._prefix}{place.key}"
            raise ConfigError(key, f"shape {got}", f"{expected} from config.json", _WAY_OUT)

    def _refuse_unknown(self) -> None:
        used = {self._prefix + place.key for places in self._places.values() for place in places}
        if unknown := sorted(self._tensors.keys() - used):
            more = "" if len(unknown) == 1 else f" and {len(unknown) - 1} more"
            expected = f"only weights of {self._architecture.family.architecture}"
            raise ConfigError(str(self._folder), f"tensor {unknown[0][:200]}{more}", expected, _WAY_OUT)

    def _refuse_odd_dtypes(self) -> None:
        by_dtype = {entry.properties.dtype: key for key, entry in self._tensors.items()}
        odd = next((dtype for dtype in by_dtype if dtype not in _DTYPES), None)
        if odd is not None:
            expected = "bfloat16, float16, float32 or float64"
            raise ConfigError(f"{self._folder}: {by_dtype[odd]}", odd, expected, "save the model in bfloat16 first")
        if len(by_dtype) > 1 and self._dtype is None:
            got = " and ".join(f"{dtype} ({key})" for dtype, key in by_dtype.items())
            raise ConfigError(str(self._folder), got, "weights of one dtype", "say which: --dtype bfloat16")

    def _chunks_by_index(self) -> dict[tuple[str, tuple[int, ...]], list[ChunkStorageMetadata]]:
        """Shards by tensor, layer and expert, so that a weight need not look at those of all others. One that spans
        several layers is with each."""
        found: dict[tuple[str, tuple[int, ...]], list[ChunkStorageMetadata]] = defaultdict(list)
        count_left = restricted.SHARDS
        leading = {self._prefix + place.key: len(place.index) for places in self._places.values() for place in places}
        for key, count in leading.items():
            for chunk in self._tensors[key].chunks:
                spans = [range(o, o + n) for o, n in zip(chunk.offsets[:count], chunk.sizes[:count], strict=True)]
                for index in itertools.product(*spans):
                    found[key, index].append(chunk)
                    count_left -= 1
                    if not count_left:
                        expected, way_out = "shards of one layer or of a few", "do not use this checkpoint"
                        raise ConfigError(f"{self._folder}: {key}", "too many shards", expected, way_out)
        return found

    def _read(self, place: _Place) -> Tensor:
        """Put together from all shards that have a part of it."""
        key = self._prefix + place.key
        low = (*place.index, *(0 for _ in place.shape))
        high = (*(number + 1 for number in place.index), *place.shape)
        target = torch.zeros(torch.Size(_minus(high, low)), dtype=self._tensors[key].properties.dtype)
        filled = 0
        for chunk in self._chunks[key, place.index]:
            begin = tuple(map(max, low, chunk.offsets))
            end = tuple(map(min, high, map(sum, zip(chunk.offsets, chunk.sizes, strict=True))))
            if all(first < last for first, last in zip(begin, end, strict=True)):
                part = self._shard(key, chunk)[_window(begin, end, tuple(chunk.offsets))]
                target[_window(begin, end, low)].copy_(part)
                filled += part.numel()
        if filled != target.numel():
            got, way_out = f"{filled} of {target.numel()} numbers", "copy the checkpoint again"
            raise ConfigError(f"{self._folder}: {key}", got, "every shard once", way_out)
        return target.reshape(place.shape)

    def _shard(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        where = self._where.get(MetadataIndex(key, chunk.offsets))
        if where is None:
            got = f"no place of the shard at {tuple(chunk.offsets)}"
            raise ConfigError(f"{self._folder}: {key}", got, "every shard once", "copy the checkpoint again")
        return restricted.read_shard(self._folder, where, self._tensors[key].properties.dtype, chunk.sizes)


def _names(weight: Weight, architecture: Architecture) -> Iterator[_Place]:
    """All places where it may lie."""
    shape = local_shape(weight, architecture, architecture.vocab_size, 1)
    for name in weight.names:
        found = _LAYER.fullmatch(name)
        if found is None:
            yield _Place(name, shape)
            continue
        layer, rest = int(found[1]), found[2]
        for key, index, counts in _below_the_layer(rest, architecture):
            yield _Place(f"decoder.layers.{layer}.{key}", shape, index, counts)
            yield _Place(f"decoder.layers.{key}", shape, (layer, *index), (architecture.num_layers, *counts))


def _below_the_layer(name: str, architecture: Architecture) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Name, index and size of the leading dimension, of one layer's weight."""
    if name in _ALSO:
        yield _ALSO[name], (), ()
    expert = _EXPERT.fullmatch(name)
    if expert is None:
        yield name, (), ()
        return
    assert architecture.experts is not None
    number, rest = int(expert[1]), expert[2]
    yield f"mlp.experts.experts.{rest}", (number,), (architecture.experts.count,)
    yield f"mlp.experts.experts.{number}.{rest}", (), ()


def _minus(one: Sequence[int], other: Sequence[int]) -> tuple[int, ...]:
    return tuple(a - b for a, b in zip(one, other, strict=True))


def _window(begin: Sequence[int], end: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    """``begin : end`` in every dimension, counted from `origin`."""
    return tuple(slice(a, b) for a, b in zip(_minus(begin, origin), _minus(end, origin), strict=True))
