"""Megatron's load of a distributed checkpoint, with readers that execute nothing (see `restricted`)."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME, TorchCommonLoadStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    TorchDistLoadShardedStrategy,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _restore_dict_types,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

from nemo_opd.engines.megatron import restricted
from nemo_opd.errors import ConfigError


def load(wanted: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`megatron.core.dist_checkpointing.load`. Collective. Raises ConfigError for a file that is none of Megatron's."""
    try:
        state: dict[str, Any] = dist_checkpointing.load(wanted, str(folder), _Shards(), _Common())
    except CheckpointException as error:  # a BaseException, that nobody else would take for an error
        rank, (cause, _) = next(iter(error.failures.items()))
        expected, way_out = "what the trainer needs", "take another checkpoint, or restore this one from a copy"
        raise ConfigError(str(folder), f"{cause} (rank {rank})", expected, way_out) from error
    return state


def tensor_names(folder: Path) -> set[str]:
    """Names of all tensors in a checkpoint."""
    return set(_metadata(folder).state_dict_metadata)


def _metadata(folder: Path) -> Metadata:
    return restricted.read_metadata(Path(folder) / ".metadata")


class _Reader(dcp.FileSystemReader):
    """Torch's, with our reader of `.metadata`, which reads it once and before the ranks meet."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._metadata = _metadata(folder)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


class _Planner(MCoreLoadPlanner):
    """Megatron's, with our reader of objects."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        set_element(self.original_state_dict, self.mappings[name], restricted.read_object(value, name))


class _Shards(TorchDistLoadShardedStrategy):
    """Tensors and objects of one rank."""

    def load(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> Any:
        tensors = [v for v in nested_values(sharded_state_dict) if isinstance(v, ShardedTensor)]
        by_key, mapping, renamed = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict)
        state = mcore_to_pyt_state_dict(by_key, True)
        planner = _Planner(
            shapes_validation_sharded_tensors=[t for t in tensors if not t.allow_shape_mismatch],
            allow_shape_mismatch_sharded_tensors={t.key: t for t in tensors if t.allow_shape_mismatch},
        )
        dcp.load_state_dict(state, _Reader(Path(checkpoint_dir)), planner=planner)
        plain = {key: _unwrap_pyt_sharded_tensor(value) for key, value in state.items()}
        loaded = _replace_sharded_keys_with_state_dict_keys(plain, mapping, renamed)
        _restore_dict_types(loaded, sharded_state_dict)
        return loaded

    def load_tensors_metadata(self, checkpoint_dir: str | Path, metadata: Metadata | None = None) -> Any:
        return super().load_tensors_metadata(Path(checkpoint_dir), metadata or _metadata(Path(checkpoint_dir)))

    def load_sharded_metadata(self, checkpoint_dir: str | Path) -> Any:
        raise NotImplementedError("would unpickle; nothing here asks for it")


class _Common(TorchCommonLoadStrategy):
    """What is the same on every rank."""

    def load_common(self, checkpoint_dir: str | Path) -> Any:
        path = Path(checkpoint_dir) / COMMON_STATE_FNAME
        return restricted.read_object(path, str(path))
