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

    def snapshot(self, folder: Path, background: bool = False) -> FileSnapshot:
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


def stored(rank: int, folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """All that Megatron's checkpoint in a folder holds, whole, whatever the layout: tensors, and the rest, by name."""
    from megatron.core import dist_checkpointing
    from torch import Tensor

    from nemo_opd.engines.megatron import cpu

    with cpu.megatron_device():
        found = dict(flat(dist_checkpointing.load_plain_tensors(folder)))
        found |= dict(flat(dist_checkpointing.load_common_state_dict(folder)))
    tensors = {name: value.clone() for name, value in found.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in found.items() if name not in tensors}


def flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dictionaries and lists by their path."""
    if not isinstance(values, dict | list):
        yield prefix, values
        return
    for name, value in values.items() if isinstance(values, dict) else enumerate(values):
        yield from flat(value, f"{prefix}/{name}" if prefix else str(name))


def different_bits(one: dict[str, Any], other: dict[str, Any], rows: int | None = None) -> tuple[int, int]:
    """(tensors that differ in any bit, tensors) of two checkpoints.

    `rows` of the vocabulary: what layouts pad it to is their own. Raises AssertionError for other names or shapes.
    """
    import torch

    def bits(tensor: Any) -> Any:
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    assert one.keys() == other.keys()
    different = 0
    for name, first in one.items():
        second = other[name]
        if first.shape != second.shape:
            assert rows is not None and min(len(first), len(second)) >= rows, (name, first.shape, second.shape)
            first, second = first[:rows], second[:rows]
        assert first.dtype == second.dtype and first.shape == second.shape, name
        different += not torch.equal(bits(first), bits(second))
    return different, len(one)
