"""What lies in a `torch_dist` checkpoint in pickle's format, read without pickle's powers. The one module that may
import `pickle`.

* `.metadata` (where every tensor lies) is run on a machine of our own: of pickle's instructions those that Megatron's
  file needs, and of classes and functions the names in `_NAMES`. Naming one, calling it and filling it in only make
  records here; nothing of torch is called while the file is read. The records are then checked field by field, against
  the files that are really there, and turned into what torch expects.
* `common.pt`, the objects between the tensors and single shards go through `torch.load(weights_only=True)`.

The manifest was verified before, and this is for one that was made by somebody else; or there is none, as in a
`torch_dist` checkpoint of Megatron-LM's.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from nemo_opd.errors import ConfigError

METADATA_BYTES = 256 << 20
"""Of `.metadata`; about 150 per shard of a tensor are usual."""
OBJECT_BYTES = 64 << 20
"""Of `common.pt`, or of an object between the tensors."""
SHARDS = 10_000_000
_AROUND = 1 << 16
"""Bytes that `torch.save` may put around the numbers of one tensor."""

_DCP = "torch.distributed.checkpoint"
_METADATA, _TENSOR, _BYTES = (
    f"{_DCP}.metadata.{n}" for n in ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata")
)
_CHUNK, _PROPERTIES, _INDEX = (
    f"{_DCP}.metadata.{n}" for n in ("ChunkStorageMetadata", "TensorProperties", "MetadataIndex")
)
_META, _FORMAT = f"{_DCP}.metadata.StorageMeta", f"{_DCP}.metadata._MEM_FORMAT_ENCODING"
_INFO, _SIZE, _LAYOUT = f"{_DCP}.filesystem._StorageInfo", "torch.Size", "torch.serialization._get_layout"
_PLANS = {f"{_DCP}.planner.{n}" for n in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")} | {
    f"megatron.core.dist_checkpointing.strategies.torch.{n}" for n in ("MCoreSavePlan", "MCoreMetadata")
}
_PATHS = {f"pathlib.{n}" for n in ("Path", "PosixPath", "_local.PosixPath")}
"""Writers of Megatron's also keep who wrote what, and where to: it is read past."""
_DTYPES = {
    f"torch.{name}": getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
        *("int64", "int32", "int16", "int8", "uint8", "bool"),
    )
}
_NAMES = {_METADATA, _TENSOR, _BYTES, _CHUNK, _PROPERTIES, _INDEX, _META, _FORMAT, _INFO, _SIZE, _LAYOUT} | {*_DTYPES}
_NAMES |= _PLANS | _PATHS


class _RefusedError(ValueError):
    """Says what the file has that no checkpoint of ours has."""


@dataclass(eq=False)
class _Name:
    """A class, function or dtype that the file names."""

    name: str


@dataclass(eq=False)
class _Made:
    """What calling or making an object of it would have given."""

    name: str
    arguments: tuple[Any, ...]
    state: Any = None


class _Machine(pickle._Unpickler):  # the one in Python: its instructions are a table
    """Reads a pickle into dictionaries, lists, tuples, numbers, texts, `_Name` and `_Made`."""

    dispatch: ClassVar[dict[int, Callable[..., Any]]] = {}
    stack: list[Any]

    def find_class(self, module: str, name: str) -> _Name:
        """Raises _RefusedError for a name that no metadata of ours has."""
        if f"{module}.{name}" not in _NAMES:
            raise _RefusedError(f"names {module}.{name}")
        return _Name(f"{module}.{name}")

    def make(self) -> None:
        """Instead of calling a function, or making an object of a class."""
        arguments = self.stack.pop()
        what = self.stack[-1]
        if not isinstance(what, _Name) or not isinstance(arguments, tuple):
            raise _RefusedError("calls what is no class or function")
        self.stack[-1] = _Made(what.name, arguments)

    def fill_in(self) -> None:
        """Instead of giving an object its state."""
        state = self.stack.pop()
        made = self.stack[-1]
        if not isinstance(made, _Made) or made.state is not None:
            raise _RefusedError("gives a state to what is no object")
        made.state = state

    def refuse(self) -> None:
        """Any other instruction."""
        raise _RefusedError("has an instruction that is not needed for metadata")


_PLAIN = (
    *("PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1"),
    *("BINUNICODE", "SHORT_BINUNICODE", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND"),
    *("APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS", "MEMOIZE", "BINGET", "LONG_BINGET", "STACK_GLOBAL"),
)
_Machine.dispatch = dict.fromkeys(range(256), _Machine.refuse)
_Machine.dispatch |= {getattr(pickle, n)[0]: pickle._Unpickler.dispatch[getattr(pickle, n)[0]] for n in _PLAIN}
_Machine.dispatch |= {
    pickle.REDUCE[0]: _Machine.make,
    pickle.NEWOBJ[0]: _Machine.make,
    pickle.BUILD[0]: _Machine.fill_in,
}


def read_metadata(path: Path) -> Metadata:
    """`.metadata` of a checkpoint's folder. 40,000 shards of tensors take 3 seconds.

    Raises:
        ConfigError: too large, names a class that it must not, or says something that cannot be; nothing was executed.
    """
    with path.open("rb") as file:
        content = file.read(METADATA_BYTES + 1)
    try:
        if len(content) > METADATA_BYTES:
            raise _RefusedError(f"has more than {METADATA_BYTES} bytes")
        return _metadata(
            _Machine(io.BytesIO(content)).load(), {f.name: f.stat().st_size for f in path.parent.iterdir()}
        )
    except _RefusedError as error:
        raise _unsafe(path, str(error)) from error
    except Exception as error:  # a broken file breaks the machine in any way that it likes
        raise _unsafe(path, f"cannot be read ({type(error).__name__}: {error})") from error


def read_object(content: io.BytesIO | Path, where: str) -> Any:
    """Tensors, numbers, texts and containers of them, as `torch.save` wrote them.

    Raises:
        ConfigError: too large, or with anything else in it; nothing was executed.
    """
    size = content.stat().st_size if isinstance(content, Path) else len(content.getbuffer())
    if size > OBJECT_BYTES:
        raise _unsafe(Path(where), f"has more than {OBJECT_BYTES} bytes")
    try:
        return torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file breaks the reader in any way that it likes
        raise _unsafe(Path(where), f"cannot be read ({_class_of(error)})") from error


def read_shard(folder: Path, place: _StorageInfo, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    """One shard of a tensor, as `torch.save` wrote it, on the CPU.

    Raises:
        ConfigError: larger than its numbers, compressed, of another dtype or shape, or with anything but a tensor in
            it; nothing was executed.
    """
    where = f"{folder / place.relative_path}: at byte {place.offset}"
    if place.length > shape.numel() * dtype.itemsize + _AROUND:
        raise _unsafe(Path(where), f"has {place.length} bytes for a shard of {tuple(shape)} {dtype}")
    with (folder / place.relative_path).open("rb") as file:
        file.seek(place.offset)
        content = io.BytesIO(file.read(place.length))
    try:
        with zipfile.ZipFile(content) as parts:
            if any(part.compress_type or part.file_size > place.length for part in parts.infolist()):
                raise _RefusedError("is compressed")
        content.seek(0)
        found = torch.load(content, map_location="cpu", weights_only=True)
    except _RefusedError as error:
        raise _unsafe(Path(where), str(error)) from error
    except Exception as error:  # a broken file breaks the reader in any way that it likes
        raise _unsafe(Path(where), f"cannot be read ({_class_of(error)})") from error
    if not isinstance(found, torch.Tensor) or (found.dtype, found.shape) != (dtype, shape):
        raise _unsafe(Path(where), f"has something else than a tensor of {tuple(shape)} {dtype}")
    return found


def _class_of(error: Exception) -> str:
    """What `torch.load` says of a class that it does not take; the kind of any other error."""
    return next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line), type(error).__name__)


def _unsafe(path: Path, what: str) -> ConfigError:
    return ConfigError(
        str(path), f"a file that {what}", "what a checkpoint of Megatron's holds", "do not use this checkpoint"
    )


# -- from records to torch's metadata


def _metadata(root: Any, sizes: dict[str, int]) -> Metadata:
    """`sizes`: bytes of the files that stand beside it."""
    values = _fields(
        root,
        _METADATA,
        {"state_dict_metadata", "planner_data", "storage_data"},
        {"storage_meta", "version", "all_local_plans", "mcore_data"},  # other versions; not looked at
    )
    if values["planner_data"] is not None:
        raise _RefusedError("has data of a planner")
    tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    shards = 0
    for name, entry in _dictionary(values["state_dict_metadata"]):
        tensors[_text(name)] = found = _entry(entry)
        shards += len(found.chunks) if isinstance(found, TensorStorageMetadata) else 1
        if shards > SHARDS:  # one list may stand in a pickle many times
            raise _RefusedError(f"has more than {SHARDS} shards")
    places = {_index(k): _place(v, sizes) for k, v in _dictionary(values["storage_data"])}
    unknown = next((index.fqn for index in places if index.fqn not in tensors), None)
    if unknown is not None:
        raise _RefusedError(f"says where {unknown[:80]!r} lies, but not what it is")
    return Metadata(tensors, None, places, StorageMeta(), None)


def _fields(made: Any, name: str, keys: set[str], others: Set[str] = frozenset()) -> dict[str, Any]:
    state = made.state if isinstance(made, _Made) and made.name == name and made.arguments == () else None
    if not isinstance(state, dict) or not keys <= state.keys() <= keys | others:
        raise _RefusedError(f"has something else where {name} is expected")
    return state


def _entry(made: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if isinstance(made, _Made) and made.name == _BYTES and made.arguments == () and not made.state:
        return BytesStorageMetadata()
    values = _fields(made, _TENSOR, {"properties", "size", "chunks"})
    size = _size(values["size"])
    if not isinstance(values["chunks"], list):
        raise _RefusedError("has no list of a tensor's chunks")
    return TensorStorageMetadata(_properties(values["properties"]), size, [_chunk(c, size) for c in values["chunks"]])


def _properties(made: Any) -> TensorProperties:
    state = made.state if isinstance(made, _Made) and made.name == _PROPERTIES else None
    if not isinstance(state, tuple) or len(state) != 5:
        raise _RefusedError("has no properties of a tensor")
    dtype, layout = state[0], state[1]
    if not isinstance(dtype, _Name) or dtype.name not in _DTYPES:
        raise _RefusedError("has a tensor without dtype")
    if not isinstance(layout, _Made) or (layout.name, layout.arguments) != (_LAYOUT, ("torch.strided",)):
        raise _RefusedError("has a tensor that is not strided")
    return TensorProperties(dtype=_DTYPES[dtype.name])


def _chunk(made: Any, size: torch.Size) -> ChunkStorageMetadata:
    values = _fields(made, _CHUNK, {"offsets", "sizes"})
    offsets, sizes = _size(values["offsets"]), _size(values["sizes"])
    if not len(offsets) == len(sizes) == len(size) or any(
        offset + length > whole for offset, length, whole in zip(offsets, sizes, size, strict=True)
    ):
        raise _RefusedError("has a chunk outside its tensor")
    return ChunkStorageMetadata(offsets, sizes)


def _index(made: Any) -> MetadataIndex:
    values = made.state if isinstance(made, _Made) and made.name == _INDEX else None
    if not isinstance(values, dict) or not {"fqn"} <= values.keys() <= {"fqn", "offset", "index"}:
        raise _RefusedError("has no name of a shard")
    offset, hint = values.get("offset"), values.get("index")
    return MetadataIndex(
        _text(values["fqn"]), None if offset is None else _size(offset), None if hint is None else _count(hint)
    )


def _place(made: Any, sizes: dict[str, int]) -> _StorageInfo:
    values = _fields(made, _INFO, {"relative_path", "offset", "length"})
    path, offset, length = _text(values["relative_path"]), _count(values["offset"]), _count(values["length"])
    if path not in sizes or not path.endswith(".distcp") or offset + length > sizes[path]:
        raise _RefusedError(f"has a shard outside its folder's files: {path[:80]!r}, {offset} + {length} bytes")
    return _StorageInfo(path, offset, length)


def _size(made: Any) -> torch.Size:
    """`torch.Size` of a tuple of counts."""
    parts = made.arguments[0] if isinstance(made, _Made) and made.name == _SIZE and len(made.arguments) == 1 else None
    if not isinstance(parts, tuple | list) or made.state is not None:
        raise _RefusedError("has no size where one is expected")
    return torch.Size([_count(part) for part in parts])


def _dictionary(values: Any) -> Iterable[tuple[Any, Any]]:
    if type(values) is not dict:
        raise _RefusedError("has no dictionary where one is expected")
    return values.items()


def _text(value: Any) -> str:
    if type(value) is not str:
        raise _RefusedError("has no text where one is expected")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise _RefusedError("has no count where one is expected")
    return value
