"""Model, optimizer, schedule and an averaged teacher through `megatron.core.dist_checkpointing`.

Every rank writes its own shards; they can be read back under another layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from nemo_opd.engines.megatron import cpu, reading
from nemo_opd.engines.megatron.average import WeightAverage
from nemo_opd.engines.megatron.model import ModelChunks
from nemo_opd.engines.megatron.shards import Copies, ShardSnapshot
from nemo_opd.errors import ConfigError

_OF_THE_RECIPE = ("max_lr", "min_lr", "betas", "eps")
"""What an optimizer's parameter groups hold of the recipe. The rest of a group is set by the schedule, or is state."""
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def snapshot(
    folder: Path,
    model: ModelChunks,
    optimizer: MegatronOptimizer,
    schedule: OptimizerParamScheduler,
    average: WeightAverage | None = None,
    copies: Copies | None = None,
) -> ShardSnapshot:
    """All that a save into an existing empty folder writes, copied where it is said whereto. Collective."""
    with cpu.megatron_device():
        return ShardSnapshot(folder, _sharded_state(model, optimizer, schedule, average, is_loading=False), copies)


def load(
    folder: Path,
    model: ModelChunks,
    optimizer: MegatronOptimizer,
    schedule: OptimizerParamScheduler,
    average: WeightAverage | None = None,
) -> None:
    """Read what a snapshot wrote, under this or another layout. Collective.

    Learning rates, weight decay and Adam's constants stay those that `optimizer` and `schedule` were built with: a
    resumed run follows its recipe, which may have changed.

    Raises ValueError when the folder is not such a checkpoint, ConfigError when it has no average to go on with.
    """
    _require_checkpoint(folder)
    if average is not None and not average.is_in(reading.tensor_names(folder)):
        way_out = "start a new run folder, or go on with the teacher that the run began with"
        raise ConfigError("teacher.source", f"ema, and no average in {folder}", "a run that began with it", way_out)
    recipe = [{name: group[name] for name in _OF_THE_RECIPE} for group in optimizer.param_groups]
    with cpu.megatron_device():
        wanted = _sharded_state(model, optimizer, schedule, average, is_loading=True)
        state = reading.load(wanted, folder)
        model.load_sharded(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        for group, values in zip(optimizer.param_groups, recipe, strict=True):
            group.update(values)
        schedule.num_steps = 0  # its `load_state_dict` adds the stored number of steps
        schedule.load_state_dict(state["schedule"])
        if average is not None:
            average.load_state(state["average"])
        dist.barrier()


def load_model(folder: Path, model: ModelChunks) -> None:
    """Read the weights alone of what a snapshot wrote, under this or another layout. Collective.

    The scales of FP8 (`_extra_state`) are left out: Transformer Engine unpickles them, and nobody trains on from here.

    Raises ValueError when the folder is not such a checkpoint.
    """
    _require_checkpoint(folder)
    with cpu.megatron_device():
        weights = model.sharded_state_dict(_metadata(model))
        extra = {n: [name for name in chunk if name.endswith("_extra_state")] for n, chunk in weights.items()}
        for n, names in extra.items():
            for name in names:
                del weights[n][name]
        state = reading.load({"model": weights}, folder)["model"]
        none = torch.empty(0, dtype=torch.uint8)
        model.load_sharded({n: {**chunk, **dict.fromkeys(extra[n], none)} for n, chunk in state.items()})
        dist.barrier()


def save_model(folder: Path, model: ModelChunks) -> None:
    """Write the weights alone into an existing empty folder, for Megatron's `dist_checkpointing.load` under any layout.
    Collective."""
    with cpu.megatron_device():
        shards = ShardSnapshot(folder, {"model": model.sharded_state_dict(_metadata(model))}, None)
        for _ in shards.write():
            pass
        shards.finish()


def _require_checkpoint(folder: Path) -> None:
    if not dist_checkpointing.check_is_distributed_checkpoint(str(folder)):
        raise ValueError(
            f"{folder}: got no Megatron checkpoint; expected a folder that `MegatronTrainer.snapshot` was written to"
        )


def _metadata(model: ModelChunks) -> dict[str, Any]:
    return {**_METADATA, "dp_cp_group": model.pg_collection.dp_cp}


@contextmanager
def _without_padding(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Meanwhile the distributed optimizer takes parameters to lie in its buffers without the padding between buckets.

    That is how it lays out the states that it saves (`get_parameter_state_dp_zero` of megatron-core 0.16.1), while it
    cuts them by places with padding (`sharded_param_state_fully_reshardable`): behind a bucket that is padded every
    parameter would be saved with states of its neighbours.
    """
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    buffers = [buffer for part in parts for buffer in getattr(part, "buffers", ())]
    padded = [buffer.param_index_map for buffer in buffers]
    unpadded = [_places(buffer) for buffer in buffers]
    try:
        for buffer, places in zip(buffers, unpadded, strict=True):
            buffer.param_index_map = places
        yield
    finally:
        for buffer, places in zip(buffers, padded, strict=True):
            buffer.param_index_map = places


def _places(buffer: Any) -> dict[torch.nn.Parameter, tuple[int, int, int]]:
    """(start, end, bucket) of each parameter of Megatron's buffer, without the padding between buckets."""
    padding = [0]
    for bucket in buffer.buckets:
        padding.append(padding[-1] + bucket.grad_data.numel() - bucket.numel_unpadded)
    return {
        parameter: (start - padding[bucket], end - padding[bucket], bucket)
        for parameter, (start, end, bucket) in buffer.param_index_map.items()
    }


def _sharded_state(
    model: ModelChunks,
    optimizer: MegatronOptimizer,
    schedule: OptimizerParamScheduler,
    average: WeightAverage | None,
    is_loading: bool,
) -> dict[str, Any]:
    metadata = _metadata(model)
    weights = model.sharded_state_dict(metadata)
    with torch.no_grad(), _without_padding(optimizer):
        states = optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=metadata)
    state = {"model": weights, "optimizer": states, "schedule": schedule.state_dict()}
    return state if average is None else {**state, "average": average.sharded_state(metadata)}
