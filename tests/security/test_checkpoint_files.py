"""A checkpoint from somebody else: its files are refused or read, and nothing in them is ever executed (S2).

Each payload would create a file, the canary. That it can is asserted too, with the readers that are not used.
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from nemo_opd.checkpoint import commit
from nemo_opd.checkpoint.commit import FileRecord, Manifest
from nemo_opd.config import Config
from nemo_opd.engines.megatron import restricted
from nemo_opd.errors import ConfigError
from tests.helpers.megatron import recipe
from tests.helpers.ranks import RankPool
from tests.helpers.tiny import tiny_checkpoint


class Evil:
    """Creates the canary when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


def metadata(path: str = "__0_0.distcp", length: int = 8, **more: Any) -> Metadata:
    """Of one tensor in one file."""
    size = torch.Size([2, 2])
    chunk = ChunkStorageMetadata(torch.Size([0, 0]), more.pop("sizes", size))
    tensor = TensorStorageMetadata(TensorProperties(torch.float32), size, [chunk])
    places = {MetadataIndex("weight", [0, 0]): _StorageInfo(path, 0, length)}
    return Metadata(
        more.pop("tensors", {"weight": tensor}), more.pop("planner", None), places, StorageMeta(**more), None
    )


def stored(folder: Path, content: bytes) -> Path:
    (folder / "__0_0.distcp").write_bytes(bytes(8))
    (folder / ".metadata").write_bytes(content)
    return folder / ".metadata"


def test_what_torch_writes_is_read(tmp_path: Path) -> None:
    got, written = restricted.read_metadata(stored(tmp_path, pickle.dumps(metadata()))), metadata()
    assert got.state_dict_metadata == written.state_dict_metadata
    assert got.storage_data == written.storage_data


def test_the_canary_can_be_created(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Evil(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


def _crafted(canary: Path) -> dict[str, tuple[bytes, str]]:
    """Content of `.metadata`, and a word of its refusal."""
    evil = Evil(canary)
    name, call = b"\x8c\x05torch\x94\x8c\x04Size\x94\x93\x94", f"touch {canary}"
    other = b"\x80\x04" + name
    text = b"\x8c" + bytes([len(call)]) + call.encode() + b"\x94"
    return {
        "a call": (pickle.dumps(evil), r"names posix\.system"),
        "a call where nothing is read": (pickle.dumps(metadata(checkpoint_id=evil)), r"names posix\.system"),
        "a call among the planner's data": (pickle.dumps(metadata(planner=evil)), r"names posix\.system"),
        "a call in an old protocol": (pickle.dumps(evil, protocol=0), "instruction that is not needed"),
        "a call by instruction": (b"cos\nsystem\n(S'touch x'\ntR.", "instruction that is not needed"),
        "eval": (b"\x80\x04\x8c\x08builtins\x94\x8c\x04eval\x94\x93\x94" + text + b"\x85R.", r"names builtins\.eval"),
        "torch's own loader": (pickle.dumps(metadata(checkpoint_id=torch.load)), r"names torch\.serialization\.load"),
        "a name inside a class": (other.replace(b"\x04Size", b"\x0aSize.count") + b".", r"names torch\.Size\.count"),
        "a size of a text": (other + text + b"\x85R.", "something else where"),
        "a size of sizes": (pickle.dumps(metadata(sizes=(torch.Size([1]), torch.Size([1])))), "no size"),
        "a state for a class": (other + b"}b.", "gives a state to what is no object"),
        "a call of a number": (b"\x80\x04K\x01)R.", "calls what is no class"),
        "a memo of 16 GB": (b"\x80\x04K\x01r\xff\xff\xff\x7f.", "instruction that is not needed"),
        "a persistent object": (b"\x80\x04K\x01Q.", "instruction that is not needed"),
        "an extension": (b"\x80\x04\x82\x01.", "instruction that is not needed"),
        "half a file": (pickle.dumps(metadata())[:-20], "cannot be read"),
        "nothing": (b"", "cannot be read"),
        "a shard in another folder": (pickle.dumps(metadata("../secret.distcp")), "outside its folder's files"),
        "a shard anywhere": (pickle.dumps(metadata("/etc/passwd")), "outside its folder's files"),
        "a shard in the manifest": (pickle.dumps(metadata(".metadata")), "outside its folder's files"),
        "a shard behind the end": (pickle.dumps(metadata(length=9)), "outside its folder's files"),
        "a chunk outside its tensor": (pickle.dumps(metadata(sizes=torch.Size([2, 3]))), "chunk outside its tensor"),
        "a place of nothing": (pickle.dumps(metadata(tensors={})), "not what it is"),
        "another object": (pickle.dumps({"weight": 1}), "something else where"),
    }


@pytest.mark.parametrize("case", _crafted(Path("x")))
def test_crafted_metadata_is_refused_by_name(tmp_path: Path, case: str) -> None:
    canary = tmp_path / "canary"
    content, word = _crafted(canary)[case]
    with pytest.raises(ConfigError, match=word):
        restricted.read_metadata(stored(tmp_path, content))
    assert not canary.exists()


def test_what_is_too_large_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restricted, "METADATA_BYTES", 100)
    with pytest.raises(ConfigError, match="more than 100 bytes"):
        restricted.read_metadata(stored(tmp_path, pickle.dumps(metadata())))
    monkeypatch.setattr(restricted, "OBJECT_BYTES", 100)
    with pytest.raises(ConfigError, match="more than 100 bytes"):
        restricted.read_object(io.BytesIO(bytes(101)), "an object")


def test_one_list_many_times_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = metadata().state_dict_metadata["weight"]
    bomb = metadata(tensors={f"{n}": tensor for n in range(100)} | {"weight": tensor})
    monkeypatch.setattr(restricted, "SHARDS", 50)
    with pytest.raises(ConfigError, match="more than 50 shards"):
        restricted.read_metadata(stored(tmp_path, pickle.dumps(bomb)))


def test_objects_between_tensors_are_numbers_and_texts(tmp_path: Path) -> None:
    file = io.BytesIO()
    torch.save({"step": torch.tensor(1), "groups": [{"betas": (0.9, 0.98), "fused": None}]}, file)
    assert restricted.read_object(io.BytesIO(file.getvalue()), "x")["groups"][0]["betas"] == (0.9, 0.98)
    torch.save({"step": Evil(tmp_path / "canary")}, file := io.BytesIO())
    with pytest.raises(ConfigError, match=r"posix\.system"):
        restricted.read_object(io.BytesIO(file.getvalue()), "x")
    assert not (tmp_path / "canary").exists()


# -- a payload in every file of a real checkpoint


def _save_one(rank: int, config: Config, run_dir: Path) -> None:
    from nemo_opd.checkpoint.store import CheckpointStore, RunState
    from nemo_opd.processes import Processes
    from tests.contract.trainers import batch_for, build

    trainer = build(config)
    trainer.train_step(batch_for(trainer.place, 0))
    CheckpointStore(run_dir, Processes.current(), 2).save(trainer, RunState(step=1), "a: recipe\n")


def _load_all(rank: int, config: Config, run_dirs: list[Path]) -> list[str]:
    """How a resume of each run ends: the error in full, or nothing."""
    from nemo_opd.checkpoint.store import CheckpointStore
    from nemo_opd.processes import Processes
    from tests.contract.trainers import build

    trainer, answers = build(config), []
    for run_dir in run_dirs:
        store = CheckpointStore(run_dir, Processes.current(), 2)
        try:
            newest = store.newest()
            assert newest is not None
            store.load(newest, trainer)
            answers.append("")
        except Exception as error:  # noqa: BLE001 - whatever it is, it is looked at
            answers.append(f"{type(error).__name__}: {error}")
    return answers


def _payload(file: Path, canary: Path) -> bytes:
    if file.name == "common.pt" or file.suffix == ".distcp":
        content = io.BytesIO()
        torch.save(Evil(canary), content, _use_new_zipfile_serialization=False)  # bytes may follow that format
        return content.getvalue()
    return pickle.dumps(Evil(canary))


def _reseal(folder: Path) -> None:
    """The manifest as somebody makes it who changed a file."""
    old = Manifest.from_json((folder / "manifest.json").read_text(), b"")
    (folder / "manifest.json").unlink()
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    files: dict[str, FileRecord] = {name: commit.record(folder, name) for name in names}
    commit.write_manifest(folder, Manifest(1, files, old.layout, old.config_sha256, old.code))


def test_a_payload_in_any_file_is_never_executed(
    ranks1: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_checkpoint(tmp_path / "model", vocab_size=91)
    config, good, canary = recipe(model), tmp_path / "good", tmp_path / "canary"
    ranks1.run(_save_one, config, good)
    step = Path("checkpoints/step-00000001")
    files = sorted(p.relative_to(good / step) for p in (good / step).rglob("*") if p.is_file())
    expected = {"common.pt", ".metadata", "metadata.json", "__0_0.distcp", "__0_1.distcp"}
    assert {str(file) for file in files} == {f"model/{n}" for n in expected} | {
        "state.json",
        "config.yaml",
        "manifest.json",
    }

    runs: dict[str, Path] = {}

    def planted(name: str, file: Path, then: Callable[[Path], None]) -> None:
        runs[name] = tmp_path / name.replace("/", "-")
        shutil.copytree(good, runs[name])
        path = runs[name] / step / file
        payload = _payload(file, canary)
        path.write_bytes(payload.ljust(path.stat().st_size, b"."))
        then(runs[name] / step)

    for file in files:
        planted(f"{file}", file, lambda folder: None)
        if file.name not in ("manifest.json", "config.yaml"):  # the recipe is read by others, as strict YAML
            planted(f"resealed {file}", file, _reseal)
    [answers] = ranks1.run(_load_all, config, [good, *runs.values()])
    assert answers[0] == ""
    for name, answer in zip(runs, answers[1:], strict=True):
        assert answer, name
        if not name.startswith("resealed"):
            assert f"step-00000001/{name}" in answer
    refused = dict(zip(runs, answers[1:], strict=True))
    assert "posix.system" in refused["resealed model/.metadata"]
    assert "posix.system" in refused["resealed model/common.pt"]
    assert not canary.exists()
    torch.load(runs["resealed model/common.pt"] / step / "model/common.pt", weights_only=False)
    assert canary.exists(), "the payloads were alive"


def test_with_a_key_a_manifest_of_somebody_else_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    (folder / "state.json").write_text('{"step": 1}')
    monkeypatch.setenv(commit.KEY_VARIABLE, "correct horse battery staple")
    manifest = Manifest(1, {"state.json": commit.record(folder, "state.json")})
    commit.write_manifest(folder, manifest)
    assert commit.read_manifest(folder) == manifest

    monkeypatch.setenv(commit.KEY_VARIABLE, "another key of the same length.")
    with pytest.raises(commit.BadCheckpoint, match=r"manifest\.json: it was not signed with the key of NEMO_OPD_CHECK"):
        commit.read_manifest(folder)
    monkeypatch.delenv(commit.KEY_VARIABLE)
    _reseal(folder)
    assert commit.read_manifest(folder).step == 1, "without a key checksums are all there is"
    monkeypatch.setenv(commit.KEY_VARIABLE, "correct horse battery staple")
    with pytest.raises(commit.BadCheckpoint, match="it is not signed, and NEMO_OPD_CHECKPOINT_KEY is set"):
        commit.read_manifest(folder)
    monkeypatch.setenv(commit.KEY_VARIABLE, "short")
    with pytest.raises(ConfigError, match=r"got 5 characters; expected at least 16; generate one"):
        commit.key_from_environment()
