"""Triton kernels where they can run, None where the eager functions are to be used."""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType

import torch
from torch import Tensor


@functools.cache
def _module() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from nemo_opd.vocab import triton_kernels

    return triton_kernels


def kernels_for(logits: Tensor) -> ModuleType | None:
    """`nemo_opd.vocab.triton_kernels` for float32 logits on a GPU; None (the eager functions) for anything else."""
    if not logits.is_cuda or logits.dtype != torch.float32:
        return None
    return _module()
