"""Norm, activation and attention for where Transformer Engine is absent: what we replace of Megatron's local spec.

Megatron's own local norm refuses sequence parallelism, its local attention needs a dense mask of size row x row, its
gated activation adds a zero and its rotary embedding makes seven passes over its input. What stands here takes part in
Megatron's layers unchanged, on CPU as on CUDA.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nemo_opd.engines.megatron.context import whole_sequences
from nemo_opd.engines.megatron.eager import rms_norm, rotate
from nemo_opd.engines.megatron.rows import Runs


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
        """Normalise the last dimension; the mean square is accumulated in at least fp32."""
        return rms_norm(x, self.weight, self.eps)


@dataclass(frozen=True)
class AttentionInputs:
    """What `PackedAttention` knows of a row: a layer's `attention_mask`, which Megatron hands through untouched."""

    runs: Runs
    cos: Tensor
    """[row, 1, head_dim], cosines of the rotary angles of each position"""
    sin: Tensor
    """[row, 1, head_dim / 2]: the second half of the angles equals the first"""
    group: dist.ProcessGroup | None = None
    """Ranks over which the sequences are cut (see `context`), where they are; the row is then what this one holds."""


def attention_inputs(
    runs: Runs, angles: Tensor, dtype: torch.dtype, group: dist.ProcessGroup | None = None
) -> AttentionInputs:
    """Of `angles` [row, 1, 1, head_dim], Megatron's for each position of the row."""
    angles = angles.squeeze(1)
    return AttentionInputs(runs, angles.cos().to(dtype), angles[..., : angles.shape[-1] // 2].sin().to(dtype), group)


class PackedAttention(nn.Module):
    """Rotary embedding and causal attention within each sequence of a packed row, on torch's own kernel.

    Takes the place of Megatron's `DotProductAttention`, and of its rotary embedding: the layers are given no angles.
    """

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        self.scale = 1.0 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: AttentionInputs, **_: Any) -> Tensor:
        """[row, 1, heads, head_dim] (fewer heads for key and value) -> [row, 1, heads * head_dim]."""
        row, known = query.shape[0], attention_mask
        query, key, value = (x.squeeze(1) for x in (query, key, value))
        query, key = (rotate(x, known.cos, known.sin) for x in (query, key))
        if known.group is not None:
            return self._attend_cut(query, key, value, known.runs, known.group).reshape(row, 1, -1)
        if len(known.runs) == 1:
            return self._attend(query, key, value, *known.runs[0]).reshape(row, 1, -1)
        sizes = [sequences * length for sequences, length in known.runs]
        parts = zip(query.split(sizes), key.split(sizes), value.split(sizes), known.runs, strict=True)
        return torch.cat([self._attend(q, k, v, *run) for q, k, v, run in parts]).reshape(row, 1, -1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, sequences: int, length: int) -> Tensor:
        """[sequences * length, heads, head_dim] of one run -> the same."""
        query, key, value = (x.unflatten(0, (sequences, length)) for x in (query, key, value))
        return self._kernel(query, key, value).flatten(0, 1)

    def _attend_cut(self, query: Tensor, key: Tensor, value: Tensor, runs: Runs, group: dist.ProcessGroup) -> Tensor:
        """[held, heads, head_dim] -> the same: this rank's two chunks of each sequence look at all that is before them.

        One all-gather of keys and values, whose backward is a reduce-scatter.
        """
        ranks, rank = group.size(), group.rank()
        gathered = gather_from_sequence_parallel_region(torch.stack([key, value], dim=1), group=group)
        parts = gathered.unflatten(0, (ranks, -1)).split([n * length for n, length in runs], dim=1)
        queries = query.split([n * length for n, length in runs])
        answers = []
        for own, part, (sequences, length) in zip(queries, parts, runs, strict=True):
            keys, values = whole_sequences(part, sequences).unbind(2)
            chunk = length // 2
            halves = own.unflatten(0, (sequences, 2, chunk)).unbind(1)
            ends = ((rank + 1) * chunk, (2 * ranks - rank) * chunk)
            found = [self._kernel(q, keys[:, :end], values[:, :end]) for q, end in zip(halves, ends, strict=True)]
            answers.append(torch.stack(found, dim=1).flatten(0, 2))
        return torch.cat(answers)

    def _kernel(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[sequences, last positions, heads, head_dim], of sequences whose keys and values are as long or longer (and
        have fewer heads) -> the same, causal."""
        # Repeating the key heads is faster on CPU than the kernel's own `enable_gqa`, above all backward.
        repeats = query.shape[2] // key.shape[2]
        if repeats > 1:
            key, value = key.repeat_interleave(repeats, dim=2), value.repeat_interleave(repeats, dim=2)
        last, length = query.shape[1], key.shape[1]
        seen = None
        if last < length:
            seen = torch.ones(last, length, dtype=torch.bool, device=query.device).tril(length - last)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        answer = F.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, is_causal=seen is None, scale=self.scale
        )
        return answer.transpose(1, 2)
