"""Lets Megatron-core run without CUDA, over gloo.

Megatron's tensor, pipeline and data parallel code is device-neutral except for names: tensors are created with
``device="cuda"``, the current device and random state are asked of `torch.cuda`, and its optimizers compare
``tensor.type()`` with the names of CUDA types. Here those names are made to mean the CPU:

* `install` replaces, once per process, the functions of `torch.cuda` that Megatron calls, and the one factory that its
  schedules call with ``device="cuda"``. That is all that forward and backward passes need;
* `megatron_device` is entered around building, clipping and checkpointing and redirects every device and type name. It
  is a scope and not a state of the process because it costs about 1.6 microseconds per torch call.

Where CUDA is available both do nothing (but see `_do_without_transformer_engine`). No arithmetic is changed by either.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


def device() -> torch.device:
    """Where this process computes: its CUDA device, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else _CPU


class _Inert:
    """Stands for a CUDA stream or event: accepts every call, orders nothing (CPU work is synchronous)."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record_event(self, *_: Any) -> _Inert:
        return self

    def __getattr__(self, _: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None

    def __enter__(self) -> _Inert:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


def _is_cuda(place: Any) -> bool:
    """True for what Megatron passes as a CUDA device: "cuda", "cuda:0", an index, or a CUDA torch.device."""
    if isinstance(place, torch.device):
        return place.type == "cuda"
    return (isinstance(place, str) and place.startswith("cuda")) or type(place) is int


class _CudaMeansCpu(TorchFunctionMode):
    """Redirects the device argument of factories, `.to`, `.cuda`, and the answer of `.type()`."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Clipping asserts fp32 gradients by this name; float64 (tests only) is let through as such.
            name = func(*args).replace("torch.", "torch.cuda.")
            return name.replace("DoubleTensor", "FloatTensor")
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        if kwargs and _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _CPU}
        return func(*args, **(kwargs or {}))


class _TorchOfSchedules:
    """The `torch` that Megatron's schedules see: its own, but `zeros` may say "cuda"."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*size: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(*size, device=_CPU if _is_cuda(device) else device, **kwargs)


def _as_moved(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """What Megatron's dispatcher gets of a CUDA tensor of counts: on the CPU, as numpy where it is to be a list."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def megatron_device() -> contextlib.AbstractContextManager[Any]:
    """Scope in which all of Megatron may be called. Never hold it across a `yield`: it would reach other code."""
    return contextlib.nullcontext() if torch.cuda.is_available() else _CudaMeansCpu()


def _do_without_transformer_engine() -> None:
    """The router asks whether Transformer Engine's matrix product is there by a name that, without it, is not defined
    (megatron-core 0.16.1). And what a layer is given to compute it once more must be tensors, which our local
    attention's is not."""
    from megatron.core import tensor_parallel
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    tensor_parallel.checkpoint = functools.partial(_checkpoint, tensor_parallel.checkpoint)


def _checkpoint(megatrons: Callable[..., Any], function: Callable[..., Any], distribute: bool, *args: Any) -> Any:
    """`megatron.core.tensor_parallel.checkpoint`, which keeps only tensors; anything else goes by the closure."""
    others = {place: arg for place, arg in enumerate(args) if not isinstance(arg, torch.Tensor)}

    def with_others(*tensors: Any) -> Any:
        return function(*(others.get(place, tensor) for place, tensor in enumerate(tensors)))

    return megatrons(with_others, distribute, *(None if place in others else arg for place, arg in enumerate(args)))


@functools.cache
def install() -> None:
    """Point the functions of `torch.cuda` that Megatron uses at the CPU. Once per process; nothing where CUDA is."""
    _do_without_transformer_engine()
    if torch.cuda.is_available():
        return
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    for name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats", "ipc_collect"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    cuda.Stream = cuda.Event = _Inert
    cuda.stream = cuda.current_stream = cuda.default_stream = _Inert

    def get_rng_state(*_: Any, **__: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
        torch.set_rng_state(state)

    cuda.get_rng_state = cuda.random.get_rng_state = get_rng_state
    cuda.set_rng_state = cuda.random.set_rng_state = set_rng_state
    cuda.manual_seed = cuda.random.manual_seed = lambda seed: torch.manual_seed(seed)
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer.moe import token_dispatcher

    token_dispatcher.maybe_move_tensor_to_cpu = _as_moved
    schedules.torch = _TorchOfSchedules()
    megatron_random._get_cuda_rng_state = get_rng_state
    megatron_random._set_cuda_rng_state = set_rng_state
