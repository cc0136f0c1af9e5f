"""Records of a data set by number: JSON lines, Parquet, or a folder saved by `datasets.Dataset.save_to_disk`.

A reader gives random access, because the stream visits records in a shuffled order and must be able to start anywhere.
It interprets nothing: what a prompt is stands in `nemo_opd.prompts.stream`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nemo_opd.errors import ConfigError

Record = Mapping[str, Any]

_SCAN_BYTES = 1 << 24
"""Bytes read at a time while looking for line ends."""


class MalformedRecordError(ValueError):
    """One record that cannot be used. Its text is the fault alone; `Records.where` tells the place."""


class Records(Protocol):
    """A finite sequence of records."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Record `index` from 0. Raises MalformedRecordError when it cannot be parsed."""

    def where(self, index: int) -> str:
        """Where the record stands, for messages: file and line (from 1), or file and row (from 0)."""


class JsonLines:
    """A .jsonl file: one JSON object per line, UTF-8; blank lines are no records.

    Opening scans for line ends (8 bytes of memory per line); a line is parsed when it is asked for. Reads use `pread`,
    so threads may share one reader.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("rb")
        self._bounds, self._line_numbers = _scan_lines(self._file)

    def __len__(self) -> int:
        return len(self._line_numbers)

    def __getitem__(self, index: int) -> Record:
        start, end = (int(bound) for bound in self._bounds[index])
        try:
            record = json.loads(os.pread(self._file.fileno(), end - start, start).decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:  # bad UTF-8 and bad JSON are ValueErrors; deep nesting recurses
            raise MalformedRecordError(f"not a line of JSON: {error}") from error
        if not isinstance(record, dict):
            raise MalformedRecordError(f"a JSON {type(record).__name__} where an object {{...}} belongs")
        return record

    def where(self, index: int) -> str:
        return f"{self._path}, line {int(self._line_numbers[index])}"


def _scan_lines(file: Any) -> tuple[np.ndarray, np.ndarray]:
    """Byte bounds int64 [records, 2] and line numbers int64 [records] of the lines that are not blank."""
    ends = [np.zeros(0, dtype=np.int64)]
    size = 0
    while chunk := file.read(_SCAN_BYTES):
        ends.append(np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord("\n")) + size)
        size += len(chunk)
    line_ends = np.concatenate(ends)
    starts = np.concatenate([[0], line_ends + 1])
    bounds = np.stack([starts, np.concatenate([line_ends, [size]])], axis=1).astype(np.int64)
    numbers = np.arange(1, len(bounds) + 1)
    # Only short lines can be blank; looking at each long one would read the file a second time.
    short = np.flatnonzero(bounds[:, 1] - bounds[:, 0] <= 8)
    blank = [i for i in short if not os.pread(file.fileno(), int(np.diff(bounds[i])[0]), int(bounds[i, 0])).strip()]
    return np.delete(bounds, blank, axis=0), np.delete(numbers, blank)


class Parquet:
    """A .parquet file. All columns but nested ones that nobody asked for are held as Arrow memory."""

    def __init__(self, path: Path, keys: frozenset[str]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._path = path
        try:
            file = pq.ParquetFile(path, memory_map=True)
            wanted = [f.name for f in file.schema_arrow if f.name in keys or not pa.types.is_nested(f.type)]
            self._table = file.read(columns=wanted)
        except (pa.ArrowException, OSError) as error:
            raise ConfigError("data.path", path, "a readable Parquet file", f"pyarrow says: {error}") from error

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: int) -> Record:
        return {name: self._table.column(name)[index].as_py() for name in self._table.column_names}

    def where(self, index: int) -> str:
        return f"{self._path}, row {index}"


class SavedDataset:
    """A folder written by `datasets.Dataset.save_to_disk`, memory-mapped by that library."""

    def __init__(self, path: Path) -> None:
        import datasets

        self._path = path
        try:
            self._dataset = datasets.load_from_disk(str(path))
        except (ValueError, OSError, KeyError) as error:
            raise ConfigError(
                "data.path", path, "a folder saved by datasets.Dataset.save_to_disk", f"datasets says: {error}"
            ) from error

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Record:
        return self._dataset[int(index)]

    def where(self, index: int) -> str:
        return f"{self._path}, row {index}"


def open_records(path: str | Path, keys: frozenset[str]) -> Records:
    """The records at `path`, by what the path is.

    Args:
        path: a .jsonl or .parquet file, or a folder saved by `datasets`.
        keys: fields that the caller will read; other fields of simple type come along for `Prompt.meta`.

    Raises:
        ConfigError: no such file, a kind that is not read here, a split dictionary instead of a split, or no records.
    """
    path = Path(path)
    if not path.exists():
        raise ConfigError("data.path", path, "an existing file or folder", "check the path or generate the data first")
    if path.is_dir():
        records = _open_folder(path)
    elif path.suffix == ".jsonl":
        records = JsonLines(path)
    elif path.suffix == ".parquet":
        records = Parquet(path, keys)
    else:
        raise ConfigError(
            "data.path", path, "a .jsonl file, a .parquet file or a folder saved by datasets", "convert or rename it"
        )
    if len(records) == 0:
        raise ConfigError("data.path", f"{path} without a record", "at least one record", "check how it was written")
    return records


def _open_folder(path: Path) -> Records:
    if (path / "dataset_dict.json").is_file():
        splits = sorted(p.name for p in path.iterdir() if p.is_dir())
        raise ConfigError(
            "data.path", f"{path} with several splits", "one split", f"append one of {splits} to the path"
        )
    if not (path / "state.json").is_file():
        raise ConfigError(
            "data.path", path, "a folder with the state.json that datasets writes", "name a file inside it instead"
        )
    return SavedDataset(path)
