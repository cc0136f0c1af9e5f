"""What a folder given on the command line is, so that a wrong one is refused before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from nemo_opd.errors import ConfigError

FolderKind = Literal["run", "checkpoint", "model"]

_MARKS: tuple[tuple[FolderKind, tuple[str, ...]], ...] = (
    ("checkpoint", ("state.json", "config.yaml")),
    ("run", ("config.yaml", "checkpoints")),
    ("model", ("config.json",)),
)


def folder_kind(path: Path, expected: tuple[FolderKind, ...]) -> FolderKind:
    """`run` (has checkpoints/), `checkpoint` (a step-* folder of a run) or `model` (Hugging Face format).

    Raises:
        ConfigError: the folder is none of the expected kinds.
    """
    found = [kind for kind, names in _MARKS if path.is_dir() and all((path / name).exists() for name in names)]
    if found and found[0] in expected:
        return found[0]
    got = f"a {found[0]} folder" if found else ("no such folder" if not path.exists() else "none of our folders")
    marks = "; ".join(f"a {kind} folder with {' and '.join(names)}" for kind, names in _MARKS if kind in expected)
    raise ConfigError(str(path), got, marks, "check the path")
