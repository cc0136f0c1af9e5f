"""Ranks of any layout without a GPU and without memory: Megatron's own modules on the meta device.

A fake process group plays hundreds of ranks in one process, one after the other; model and gradient buffers are made as
the trainer makes them, but with tensors that have a shape and nothing else. Takes a fraction of a second for each rank.
Only for a process of its own: it must not belong to a process group yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from nemo_opd.config import LayoutConfig
from nemo_opd.engines.megatron import cpu
from nemo_opd.engines.megatron.families import architecture_of
from nemo_opd.engines.megatron.model import ModelChunks, dtype_of, empty_model, transformer_config
from nemo_opd.engines.megatron.parallel import Layout
from nemo_opd.engines.megatron.trainer import data_parallel, gradient_buffers

_META = torch.device("meta")


@dataclass(frozen=True)
class Blueprint:
    """One rank as it was built."""

    rank: int
    stage: int
    """Its pipeline stage."""
    dense: int
    """Numbers in parameters that all replicas share."""
    expert: int
    """Numbers in parameters of this rank's experts."""
    parameter_bytes: int
    gradient_bytes: int
    """Of Megatron's gradient buffers, padding included; 0 for a model that is not trained."""


def blueprints(
    values: Mapping[str, Any],
    where: str,
    config: LayoutConfig,
    world_size: int,
    dtype: str,
    vocab_padding_multiple: int = 1,
    trained: bool = True,
    distributed: bool = True,
) -> Iterator[Blueprint]:
    """Every distinct rank of a model: one of each pipeline stage, since the others of a stage hold equal shapes.

    Args:
        values: the model's config.json, found at `where`. Experts are whole, each on its rank.
        distributed: whether the gradient buffers are those of the distributed optimizer.

    Raises:
        ConfigError: an unsupported model.
        RuntimeError: this process belongs to a process group.
    """
    if dist.is_initialized():
        raise RuntimeError("got a process of a process group; expected one of its own, as ranks are played in it")
    cpu.install()
    tp, pp = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    cp = config.context_parallel_size
    dp = world_size // (tp * cp * pp)
    for stage in range(pp):
        layout = Layout(tp, pp, dp, stage * tp * cp * dp, config.expert_model_parallel_size, cp, config.chunks)
        with _fake_rank(layout), _OnMeta(), _META:
            model = _model(values, where, config, layout, dtype, vocab_padding_multiple)
            gradients = _gradient_bytes(model, distributed, dtype) if trained else 0
        yield _blueprint(layout, model, gradients)


class _OnMeta(TorchFunctionMode):
    """Sends what names a device to the meta device; inside `torch.device("meta")`, which sends the rest."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and isinstance(args[1], str | torch.device | int):
            args = (args[0], _META, *args[2:])
        if kwargs and kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": _META}
        return func(*args, **(kwargs or {}))


@contextmanager
def _fake_rank(layout: Layout) -> Iterator[None]:
    """This process as one rank of the layout; every collective does nothing."""
    world = layout.stage_size * layout.pp
    dist.init_process_group("fake", store=FakeStore(), rank=layout.rank, world_size=world)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            virtual_pipeline_model_parallel_size=layout.virtual,
            context_parallel_size=layout.cp,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=1,
            create_gloo_process_groups=False,
        )
        with torch.random.fork_rng(devices=[]):
            model_parallel_cuda_manual_seed(0, force_reset_rng=True)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _model(
    values: Mapping[str, Any],
    where: str,
    config: LayoutConfig,
    layout: Layout,
    dtype: str,
    vocab_padding_multiple: int,
) -> ModelChunks:
    architecture = architecture_of(values, where)
    megatron = transformer_config(architecture, config, layout, dtype_of(dtype, "dtype"))
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return empty_model(architecture, megatron, layout, groups, vocab_padding_multiple)


def _gradient_bytes(model: ModelChunks, distributed: bool, dtype: str) -> int:
    wrapped = data_parallel(model, distributed, dtype_of(dtype, "dtype"))
    return sum(buffer.grad_data.nbytes for buffer in gradient_buffers(wrapped))


def _blueprint(layout: Layout, model: ModelChunks, gradient_bytes: int) -> Blueprint:
    parameters = list(model.parameters())
    expert = sum(p.numel() for p in parameters if not getattr(p, "allreduce", True))
    return Blueprint(
        rank=layout.rank,
        stage=layout.pp_rank,
        dense=sum(p.numel() for p in parameters) - expert,
        expert=expert,
        parameter_bytes=sum(p.nbytes for p in parameters),
        gradient_bytes=gradient_bytes,
    )
