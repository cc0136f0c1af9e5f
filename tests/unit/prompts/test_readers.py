from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_opd.errors import ConfigError
from nemo_opd.prompts.readers import MalformedRecordError, open_records

KEYS = frozenset({"prompt", "answer", "response"})
ROWS = [{"prompt": f"problem {i}", "answer": str(i), "level": i} for i in range(7)]


def _jsonl(folder: Path) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def _parquet(folder: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "data.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=3)
    return path


def _saved(folder: Path) -> Path:
    import datasets

    path = folder / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(str(path))
    return path


@pytest.mark.parametrize("make", [_jsonl, _parquet, _saved])
def test_every_kind_gives_the_same_records_in_any_order(tmp_path: Path, make) -> None:
    records = open_records(make(tmp_path), KEYS)
    assert len(records) == 7
    for i in (6, 0, 3, 3, 5):
        assert dict(records[i]) == ROWS[i]
        assert str(i) in records.where(i) or str(i + 1) in records.where(i)


@pytest.mark.parametrize("tail", ["", "\n", "\n\n  \n"])
def test_jsonl_line_numbers_count_blank_lines(tmp_path: Path, tail: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a"}\n\n   \r\n{"prompt": "b"}\r\n{"prompt": "c"}' + tail)
    records = open_records(path, KEYS)
    assert [records[i]["prompt"] for i in range(len(records))] == ["a", "b", "c"]
    assert [records.where(i) for i in range(3)] == [f"{path}, line {n}" for n in (1, 4, 5)]


def test_jsonl_survives_lines_longer_than_the_scan_window(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("nemo_opd.prompts.readers._SCAN_BYTES", 5)
    records = open_records(_jsonl(tmp_path), KEYS)
    assert [dict(records[i]) for i in range(7)] == ROWS


def test_jsonl_reads_a_byte_order_mark_and_unicode(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes("\ufeff".encode() + '{"prompt": "½ é 数"}\n'.encode())
    assert open_records(path, KEYS)[0] == {"prompt": "½ é 数"}


@pytest.mark.parametrize(
    "line", [b'{"prompt": ', b"[1, 2]", b"17", b'{"prompt": "\xff"}', b"[" * 100_000, b"9" * 5000, b"{} {}"]
)
def test_malformed_line_is_found_when_read_and_its_neighbours_are_not_hurt(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n' + line + b'\n{"prompt": "c"}\n')
    records = open_records(path, KEYS)
    with pytest.raises(MalformedRecordError):
        records[1]
    assert records[2]["prompt"] == "c"
    assert records.where(1).endswith("line 2")


def test_parquet_leaves_nested_columns_that_nobody_asked_for(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    messages = [{"role": "user", "content": "hi"}]
    pq.write_table(pa.Table.from_pylist([{"prompt": messages, "blob": [1, 2]}]), tmp_path / "d.parquet")
    assert open_records(tmp_path / "d.parquet", KEYS)[0] == {"prompt": messages}


def _not_parquet(folder: Path) -> Path:
    (folder / "x.parquet").write_bytes(b"no parquet")
    return folder / "x.parquet"


def _splits(folder: Path) -> Path:
    import datasets

    split = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(str(folder / "splits"))
    return folder / "splits"


def _text(folder: Path) -> Path:
    (folder / "x.txt").write_text("hello")
    return folder / "x.txt"


def _empty(folder: Path) -> Path:
    (folder / "x.jsonl").write_text("\n\n")
    return folder / "x.jsonl"


def _broken_folder(folder: Path) -> Path:
    (folder / "state.json").write_text("{")
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "absent.jsonl", "existing"),
        (_not_parquet, "Parquet"),
        (_splits, r"\['test', 'train'\]"),
        (_text, "x.txt; expected a .jsonl"),
        (_empty, "at least one record"),
        (lambda folder: folder, "state.json"),
        (_broken_folder, "save_to_disk"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path, make, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        open_records(make(tmp_path), KEYS)
    assert caught.value.key == "data.path"
