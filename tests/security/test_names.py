"""Names in a manifest and in the index of a model's weights lead nowhere outside their folder (S3)."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nemo_opd.checkpoint import commit
from nemo_opd.engines.megatron.hf_files import HFTensors
from nemo_opd.errors import ConfigError


def _sealed(folder: Path, names: list[str]) -> None:
    """A manifest with these names, whose checksum is right: made by somebody who knows the format."""
    body = {"format": 1, "step": 1, "layout": {}, "config_sha256": "", "code": {}}
    body["files"] = {name: {"size": 6, "sha256": "0" * 64} for name in names}
    manifest = commit.Manifest(1, {})
    text = json.dumps(body, indent=1, sort_keys=True) + "\n"
    sealed = json.loads(manifest.to_json(b"")) | {"manifest": body}
    sealed["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(sealed, indent=1, sort_keys=True) + "\n")


def _linked_file(folder: Path) -> None:
    (folder / "inside").unlink()
    (folder / "inside").symlink_to(folder.parent / "secret")


def _linked_folder(folder: Path) -> None:
    (folder / "model").symlink_to(folder.parent)


def _linked_manifest(folder: Path) -> None:
    (folder / "manifest.json").rename(folder.parent / "elsewhere.json")
    (folder / "manifest.json").symlink_to(folder.parent / "elsewhere.json")


def _doubled(folder: Path) -> None:
    path = folder / "manifest.json"
    entry = '"inside": {\n    "sha256": "' + "0" * 64 + '",\n    "size": 6\n   }'
    text = path.read_text()
    assert entry in text
    path.write_text(text.replace(entry, f"{entry},\n   {entry}"))


def _pipe(folder: Path) -> None:
    (folder / "inside").unlink()
    os.mkfifo(folder / "inside")


Case = tuple[str, Callable[[Path], None], str]
NOT_A_NAME = "is no name of a file below the checkpoint"
MANIFESTS: dict[str, Case] = {
    "above": ("../secret", lambda _: None, NOT_A_NAME),
    "above, later": ("inside/../../secret", lambda _: None, NOT_A_NAME),
    "absolute": ("/etc/passwd", lambda _: None, NOT_A_NAME),
    "here": ("./inside", lambda _: None, NOT_A_NAME),
    "nothing": ("", lambda _: None, NOT_A_NAME),
    "of another system": ("..\\secret", lambda _: None, NOT_A_NAME),
    "with an end in it": ("inside\0.txt", lambda _: None, NOT_A_NAME),
    "a long part": ("a" * 256, lambda _: None, NOT_A_NAME),
    "a long way": ("/".join(["a" * 200] * 6), lambda _: None, NOT_A_NAME),
    "the manifest itself": ("manifest.json", lambda _: None, NOT_A_NAME),
    "twice": ("inside", _doubled, "'inside' twice"),
    "a link": ("inside", _linked_file, "no plain file"),
    "a linked folder": ("model/secret", _linked_folder, "no plain file"),
    "a linked manifest": ("inside", _linked_manifest, "manifest.json: "),
    "a pipe": ("inside", _pipe, "no plain file"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_manifest_names_files_of_its_own_folder(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, change, word = MANIFESTS[case]
    (tmp_path / "secret").write_text("secret")
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    (folder / "inside").write_text("inside")
    _sealed(folder, [name])
    change(folder)
    opened: list[Path] = []
    real = os.open

    def looking(*arguments: Any, **more: Any) -> int:
        descriptor = real(*arguments, **more)
        opened.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        return descriptor

    monkeypatch.setattr(os, "open", looking)
    with pytest.raises(commit.BadCheckpoint, match=re.escape(word)):
        commit.check(folder, commit.read_manifest(folder))
    assert [path for path in opened if not path.is_relative_to(folder)] == []


def test_a_checkpoint_is_no_link(tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    _sealed(folder, ["inside"])
    (tmp_path / "step-00000001").symlink_to(folder)
    with pytest.raises(commit.BadCheckpoint):
        commit.read_manifest(tmp_path / "step-00000001")


INDEXES = {
    "above": "../secret.safetensors",
    "absolute": "/secret.safetensors",
    "a folder": "inside/secret.safetensors",
    "of another system": "..\\secret.safetensors",
    "with an end in it": "a.safetensors\0",
    "no safetensors": "secret.bin",
    "a long name": "a" * 300 + ".safetensors",
    "a number": 7,
}


@pytest.mark.parametrize("case", INDEXES)
def test_an_index_names_files_of_its_own_folder(tmp_path: Path, case: str) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / "secret.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    index = {"weight_map": {"weight": INDEXES[case]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="its index is unsafe"):
        HFTensors(folder)


def test_an_index_says_once_where_a_tensor_lies(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"weight": "a.safetensors", "weight": "b.safetensors"}}'
    )
    with pytest.raises(ConfigError, match="'weight' twice"):
        HFTensors(tmp_path)
