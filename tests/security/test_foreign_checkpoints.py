"""A Megatron checkpoint from somebody else, which has no manifest: nothing in it is ever executed on import (S2)."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_opd.cli import main
from nemo_opd.engines.megatron import restricted
from tests.helpers.tiny import tiny_checkpoint
from tests.helpers.torch_dist import megatron_tensors, save_torch_dist


class Evil:
    """Creates the canary when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


def saved(content: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def compressed(tensor: torch.Tensor) -> bytes:
    """`torch.save`'s archive once more, so that few bytes become many."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(tensor))) as old, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return stream.getvalue()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("good")
    tiny_checkpoint(root / "hf", "llama", num_hidden_layers=2)
    save_torch_dist(megatron_tensors(root / "hf"), root / "in")
    return root


@pytest.fixture
def checkpoint(good: Path, tmp_path: Path) -> Path:
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    return tmp_path / "in"


def imported(checkpoint: Path) -> int:
    here = checkpoint.parent
    return main(["import", str(checkpoint), str(here / "out"), "--like", str(here / "hf")])


def plant(checkpoint: Path, content: bytes) -> None:
    """In the place of the output layer's shard."""
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    (checkpoint / "__9_9.distcp").write_bytes(content)
    for index, place in metadata.storage_data.items():
        if index.fqn == "output_layer.weight":
            place.relative_path, place.offset, place.length = "__9_9.distcp", 0, len(content)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def test_without_a_payload_it_is_imported(checkpoint: Path) -> None:
    assert imported(checkpoint) == 0


def test_metadata_with_a_payload(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    payload = pickle.dumps(Evil(tmp_path / "canary"))
    (checkpoint / ".metadata").write_bytes(payload)
    assert imported(checkpoint) == 2
    assert "names posix.system" in capsys.readouterr().err
    assert not (tmp_path / "canary").exists() and not (tmp_path / "out").exists()
    pickle.loads(payload)
    assert (tmp_path / "canary").exists(), "the payload was alive"


def test_a_class_that_no_checkpoint_needs_is_named(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(zipfile.ZipFile))
    assert imported(checkpoint) == 2
    assert "names zipfile.ZipFile" in capsys.readouterr().err


def test_who_wrote_what_is_read_past_and_hides_nothing(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Megatron's writers add plans, and older ones shapes, to torch's metadata."""
    from torch.distributed.checkpoint.planner import SavePlan

    metadata: Any = pickle.loads((checkpoint / ".metadata").read_bytes())
    metadata.all_local_plans, metadata.mcore_data = [SavePlan([])], {"x": {"shape": torch.Size([2, 3])}}
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    assert imported(checkpoint) == 0
    metadata.all_local_plans = [SavePlan([Evil(tmp_path / "canary")])]  # type: ignore[list-item]
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    assert main(["import", str(checkpoint), str(tmp_path / "again"), "--like", str(tmp_path / "hf")]) == 2
    assert "names posix.system" in capsys.readouterr().err
    assert not (tmp_path / "canary").exists()


def test_common_pt_is_not_opened(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "common.pt").write_bytes(saved(Evil(tmp_path / "canary")))
    assert imported(checkpoint) == 0
    assert not (tmp_path / "canary").exists()
    torch.load(checkpoint / "common.pt", weights_only=False)
    assert (tmp_path / "canary").exists(), "the payload was alive"


def test_a_payload_in_a_shard(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = saved(Evil(tmp_path / "canary"))
    plant(checkpoint, content)
    assert imported(checkpoint) == 2
    error = capsys.readouterr().err
    assert "posix.system" in error and ".distcp: at byte" in error
    assert not (tmp_path / "canary").exists() and not (tmp_path / "out").exists()
    torch.load(io.BytesIO(content), weights_only=False)
    assert (tmp_path / "canary").exists(), "the payload was alive"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (compressed(torch.zeros(96, 32)), "is compressed"),
        (saved(torch.zeros(96, 16)), "something else than a tensor of (96, 32) torch.float32"),
        (saved(torch.zeros(96, 32, dtype=torch.bfloat16)), "something else than a tensor"),
        (saved([1, 2]), "something else than a tensor"),
        (saved(torch.zeros(1).expand(96, 32)), ""),
        (b"no archive", "cannot be read (BadZipFile)"),
    ],
    ids=["compressed", "another shape", "another dtype", "a list", "one number many times", "noise"],
)
def test_a_shard_that_is_something_else(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], content: bytes, words: str
) -> None:
    plant(checkpoint, content)
    assert imported(checkpoint) == (2 if words else 0)
    assert words in capsys.readouterr().err


def test_a_shard_larger_than_its_numbers(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restricted, "_AROUND", 10)
    assert imported(checkpoint) == 2
    assert "bytes for a shard of" in capsys.readouterr().err


def test_a_model_folder_that_names_code(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint.parent / "hf" / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "x.Y"}}')
    assert imported(checkpoint) == 2
    assert "--like: got auto_map" in capsys.readouterr().err
