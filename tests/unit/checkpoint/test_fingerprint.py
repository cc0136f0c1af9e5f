"""A run that goes on reads the models and the data that it began with, wherever they lie by now."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from nemo_opd.checkpoint import fingerprint
from nemo_opd.checkpoint.fingerprint import look, same_inputs
from nemo_opd.errors import ConfigError
from nemo_opd.processes import Processes
from tests.helpers.ranks import RankPool


def make_model(folder: Path, weights: bytes = b"weights") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model-1.safetensors").write_bytes(weights)
    (folder / "model-2.safetensors").write_bytes(b"more")
    return folder


def make_data(folder: Path) -> Path:
    folder.mkdir()
    (folder / "data.jsonl").write_text('{"prompt": "1+1="}\n')
    return folder / "data.jsonl"


def compare(paths: dict[str, Path], known: Any, accepted: bool = False) -> dict[str, Any]:
    return same_inputs(paths, json.loads(json.dumps(known)), accepted, Processes())


def test_the_same_contents_are_the_same_input_wherever_they_lie(tmp_path: Path) -> None:
    paths = {"teacher.model": make_model(tmp_path / "a" / "teacher"), "data.path": make_data(tmp_path / "data")}
    known = compare(paths, {})
    assert compare(paths, known) == known
    shutil.copytree(paths["teacher.model"], tmp_path / "moved")
    shutil.copy(paths["data.path"], tmp_path / "renamed.jsonl")
    moved = compare({"teacher.model": tmp_path / "moved", "data.path": tmp_path / "renamed.jsonl"}, known)
    assert moved["teacher.model"]["path"] == str(tmp_path / "moved")
    assert [moved[key]["sha256"] for key in paths] == [known[key]["sha256"] for key in paths]
    (paths["teacher.model"] / "config.json").write_text('{"x": 1}')
    assert compare(paths, known) == known, "of a model, the weights"


def change(path: Path) -> None:
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def rename(path: Path) -> None:
    path.rename(path.with_name("model-3.safetensors"))


@pytest.mark.parametrize("happens", [change, Path.unlink, rename])
def test_other_weights_are_refused_with_a_way_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, happens: Any
) -> None:
    paths = {"student.model": make_model(tmp_path / "s"), "teachers.math.model": make_model(tmp_path / "t", b"wise")}
    known = compare(paths, {})
    happens(tmp_path / "t" / "model-1.safetensors")
    with pytest.raises(ConfigError, match="other weights than at the start") as refused:
        compare(paths, known)
    assert refused.value.key == "teachers.math.model"
    assert known["teachers.math.model"]["sha256"][:12] in str(refused.value)
    assert "run.accept_changes=true" in refused.value.way_out
    found = compare(paths, known, accepted=True)
    assert "teachers.math.model" in caplog.text and compare(paths, found) == found, "the next attempt knows them"


def test_other_data_of_the_same_length_is_refused(tmp_path: Path) -> None:
    path = make_data(tmp_path / "data")
    known = compare({"data.path": path}, {})
    path.write_text('{"prompt": "1+2="}\n')
    with pytest.raises(ConfigError, match=r"data\.path: got .* with other data than at the start"):
        compare({"data.path": path}, known)


def test_a_folder_of_data_is_all_of_its_files(tmp_path: Path) -> None:
    folder = make_data(tmp_path / "data").parent
    (folder / "shards").mkdir()
    (folder / "shards" / "1.arrow").write_text("1")
    before = look(folder)
    assert set(before["files"]) == {"data.jsonl", "shards/1.arrow"}
    (folder / "shards" / "1.arrow").write_text("2")
    assert look(folder)["sha256"] != before["sha256"]


def test_what_was_not_touched_is_not_read_again(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    known = look(folder)
    with mock.patch.object(fingerprint, "_digest", side_effect=AssertionError("read")):
        assert look(folder, known) == known
    os.utime(folder / "model-1.safetensors")
    assert look(folder, known)["sha256"] == known["sha256"]


def test_a_snapshot_of_a_hub_is_named_by_its_revision(tmp_path: Path) -> None:
    assert look(make_model(tmp_path / "models--x--y" / "snapshots" / "0a1b2c"))["revision"] == "0a1b2c"
    assert look(make_model(tmp_path / "plain"))["revision"] is None


def _missing(rank: int, folder: str) -> str:
    """Only the first process looks."""
    try:
        same_inputs({"data.path": Path(folder) / str(rank)}, {}, False, Processes.current())
    except ConfigError as error:
        return str(error)
    return ""


def test_a_file_that_is_not_there_is_said_on_every_rank(ranks2: RankPool, tmp_path: Path) -> None:
    for said in ranks2.run(_missing, str(tmp_path)):
        assert said.startswith("data.path: got") and "No such file" in said
