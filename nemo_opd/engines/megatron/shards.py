"""Writing Megatron's distributed checkpoint without helper processes.

Megatron's own writer forks one process per file, from a process with threads and, on a GPU, a CUDA context. This one
writes the same format (`torch_dist`) in the calling thread: from where the tensors lie, or, where training is to go on
meanwhile, from copies.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync, _split_by_size_and_type
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint.filesystem import SerializationFormat, WriteResult, _metadata_fn, _write_item
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItemType

_FILES = 2
"""Of one rank. Two small ones can be read by two readers."""
_BACKEND = "torch_dist"
_COORDINATOR = 0


class Copies:
    """Host memory that one save after another is copied into. It is kept between them: to be given fresh memory takes
    longer than to copy into it, and pinned memory is dear."""

    def __init__(self) -> None:
        self._held: dict[tuple[Any, ...], Tensor] = {}

    def of(self, name: Any, tensor: Tensor) -> Tensor:
        """A copy that nobody else writes to until the tensor of this name is copied again. From a GPU it is there only
        after a synchronisation."""
        key = (name, tensor.shape, tensor.dtype)
        if key not in self._held:
            self._held[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return self._held[key].copy_(tensor, non_blocking=tensor.is_cuda)


class ShardWriter(FileSystemWriterAsync):
    """This rank's part of a checkpoint: planned, and copied where it is to be, when it is made; written when asked."""

    def __init__(self, folder: Path, copies: Copies | None) -> None:
        super().__init__(folder, thread_count=_FILES)
        self._copies = copies
        self._files: list[tuple[str, list[tuple[Any, Any]]]] = []
        self._results: list[WriteResult] = []

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Find all that this rank writes, and copy it to host memory, also where it lies there already."""
        files = [items for items in _split_by_size_and_type(self.thread_count, plan.items) if items]
        for number, items in enumerate(files):
            name = f"{plan.storage_data.prefix}{number}.distcp"
            self._files.append((name, [(item, self._kept(item, planner.resolve_data(item))) for item in items]))
        if self._copies is not None and torch.cuda.is_available():
            torch.cuda.synchronize()  # copies into pinned memory return before they are done

    def _kept(self, item: Any, data: Any) -> Any:
        if item.type is WriteItemType.BYTE_IO:
            return data  # made for this save
        return data.detach() if self._copies is None else self._copies.of(item.index, data.detach())

    def write(self) -> Iterator[str]:
        """See `Snapshot.write`."""
        transforms = getattr(self, "transforms")  # noqa: B009 - torch's, unknown to its own types
        while self._files:
            name, items = self._files.pop(0)
            with (Path(self.checkpoint_dir) / name).open("xb") as stream:
                for item, data in items:
                    data = data if item.type is WriteItemType.BYTE_IO else _alone(data)
                    done = _write_item(transforms, stream, data, item, name, SerializationFormat.TORCH_SAVE)
                    self._results.append(done)
                stream.flush()
                os.fsync(stream.fileno())
            yield name

    def retrieve_write_results(self) -> list[WriteResult]:
        """Where every item of this rank lies: `.metadata` says so."""
        return self._results


def _alone(tensor: Tensor) -> Tensor:
    """On the CPU, in memory that holds nothing else: torch writes all of a tensor's memory."""
    tensor = tensor.cpu()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()


class ShardSnapshot:
    """`nemo_opd.engines.protocols.Snapshot` of a state dict of Megatron's. Nothing is written when it is made."""

    def __init__(self, folder: Path, state: dict[str, Any], copies: Copies | None) -> None:
        """Collective.

        Args:
            state: tensors as Megatron's `ShardedTensor`s, and what is the same on every rank.
            copies: where tensors are copied to; None: they are written from where they lie.
        """
        sharded, common = save_preprocess(state, True)
        sharded, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
        self._folder = folder
        self._writer = ShardWriter(folder, copies)
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        plan = save_state_dict_async_plan(
            mcore_to_pyt_state_dict(sharded, False), self._writer, None, _COORDINATOR, planner=planner
        )
        _, self._metadata, self._ranks = plan[0]
        if self._metadata is not None:
            del self._metadata.all_local_plans  # kept for a cache that is not used, and larger than all the rest
        self._common = io.BytesIO()
        if self._ranks.is_coordinator:
            torch.save(common, self._common)

    def write(self) -> Iterator[str]:
        """See `Snapshot.write`."""
        if self._ranks.is_coordinator:
            (self._folder / COMMON_STATE_FNAME).write_bytes(self._common.getbuffer())
            yield COMMON_STATE_FNAME
        yield from self._writer.write()

    def finish(self) -> list[str]:
        """See `Snapshot.finish`: where everything lies (`.metadata`), and the format (`metadata.json`)."""
        results = self._ranks.gather_object(self._writer.retrieve_write_results())
        if results is None:
            return []
        self._writer.finish(self._metadata, results)
        save_config(CheckpointingConfig(_BACKEND, 1), str(self._folder))
        return [_metadata_fn, CONFIG_FNAME]
