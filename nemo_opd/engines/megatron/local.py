"""Norm and attention for where Transformer Engine is absent: the two kernels of Megatron's local spec that we replace.

Megatron's own local norm refuses sequence parallelism and its local attention needs a dense mask of size row x row.
Both modules here take part in Megatron's layers unchanged, on CPU as on CUDA.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nemo_opd.engines.megatron.rows import Slots


class RMSNorm(nn.Module):
    """Root-mean-square norm whose weight Megatron knows how to reduce under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        device = torch.device("cpu") if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        # Each rank saw a part of the row only: `finalize_model_grads` sums the parts of parameters marked so.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension; the mean square is accumulated in at least fp32 by the kernel."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class _ToSlots(torch.autograd.Function):
    """Row -> slots. The gradient of padding slots is zero (nothing reads them), so backward is a gather as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Slots) -> Tensor:
        ctx.slots = slots
        return x.index_select(0, slots.source)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.slots.slot), None


class _ToRow(torch.autograd.Function):
    """Slots -> row: the inverse, dropping the padding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Slots) -> Tensor:
        ctx.slots = slots
        return x.index_select(0, slots.slot)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.slots.source) * ctx.slots.real, None


class PackedAttention(nn.Module):
    """Causal attention within each sequence of a packed row, on torch's own kernel.

    Takes the place of Megatron's `DotProductAttention`. The layer's `attention_mask` argument, which Megatron hands
    through untouched, carries the row's `Slots`.
    """

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        self.scale = 1.0 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Slots, **_: Any) -> Tensor:
        """[row, 1, heads, head_dim] (fewer heads for key and value) -> [row, 1, heads * head_dim]."""
        slots = attention_mask
        row = query.shape[0]
        query, key, value = (x.squeeze(1) for x in (query, key, value))
        if slots.shapes == ((1, row),):
            return self._attend(query, key, value, 1, row).view(row, 1, -1)
        query, key, value = (_ToSlots.apply(x, slots) for x in (query, key, value))
        answers, first = [], 0
        for sequences, longest in slots.shapes:
            part = slice(first, first + sequences * longest)
            answers.append(self._attend(query[part], key[part], value[part], sequences, longest))
            first = part.stop
        return _ToRow.apply(torch.cat(answers), slots).reshape(row, 1, -1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, sequences: int, longest: int) -> Tensor:
        """[slots, heads, head_dim] of one batch -> the same."""
        # Repeating the key heads is faster on CPU than the kernel's own `enable_gqa`, above all backward.
        repeats = query.shape[1] // key.shape[1]
        if repeats > 1:
            key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        query, key, value = (x.unflatten(0, (sequences, longest)).transpose(1, 2) for x in (query, key, value))
        answer = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scale)
        return answer.transpose(1, 2).flatten(0, 1)
