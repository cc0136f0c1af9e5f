"""Trainers without weights, for tests whose subject is the store, and a save without a store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any


class FileSnapshot:
    """Two small files from each rank, and one about all."""

    def __init__(self, folder: Path, value: str, rank: int) -> None:
        self.folder, self.value, self.rank = folder, value, rank

    def write(self) -> Iterator[str]:
        for part in ("a", "b"):
            name = f"{part}-{self.rank}"
            (self.folder / name).write_text(f"{part} {self.value}")
            yield name

    def finish(self) -> list[str]:
        if self.rank:
            return []
        (self.folder / "index").write_text("a b")
        return ["index"]


class FileTrainer:
    """Saves one word; stands where an engine would, since the store only calls `snapshot` and `load`."""

    def __init__(self, value: str = "", rank: int = 0) -> None:
        self.value, self.rank = value, rank

    def snapshot(self, folder: Path) -> FileSnapshot:
        return FileSnapshot(folder, self.value, self.rank)

    def load(self, folder: Path) -> None:
        assert (folder / "index").read_text() == "a b"
        words = [(folder / f"{part}-{self.rank}").read_text() for part in ("a", "b")]
        self.value = words[0].removeprefix("a ")
        assert words[1] == f"b {self.value}", "files of two saves"


def save_now(trainer: Any, folder: Path) -> None:
    """What a trainer saves, in an existing empty folder. Collective."""
    import torch.distributed as dist

    snapshot = trainer.snapshot(folder)
    list(snapshot.write())
    snapshot.finish()
    if dist.is_initialized():
        dist.barrier()
