"""Key-value cache of a decode batch whose sequences have different lengths, and the attention that reads it.

Every sequence owns a slot (a row of the cache) and fills its columns from 0, so there is no left padding: a token's
column is its position. Running sequences always occupy slots ``0 .. count - 1``; when some finish, the last ones move
into their places. Columns beyond a sequence's length are masked, and are overwritten as it grows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedConfig
from transformers.cache_utils import Cache

ATTENTION = "nemo_opd_slots"
"""Name under which `slot_attention` is registered with transformers. It has no mask function there on purpose: then
transformers hands a four-dimensional mask through as it is, and makes none where we give none."""

_FIRST_COLUMNS = 64


def slot_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of a prefill (no mask: causal within the new tokens) or of one decode step (additive mask).

    In a decode step every sequence has one query, so the heads that share a key-value head become the query axis of
    that head: grouped-query attention without copying the cache for each group, which is what repeating it would do.

    Args:
        query: [batch, heads, new, head_dim]; key, value: [batch, kv_heads, columns, head_dim].
        attention_mask: None, or [batch, 1, 1, columns] with 0 or -inf; then ``new`` is 1.

    Returns: [batch, new, heads, head_dim] and None, as transformers expects.
    """
    batch, heads, new, head_dim = query.shape
    kv_heads = key.shape[1]
    if attention_mask is None:
        out = scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=heads != kv_heads
        )
        return out.transpose(1, 2), None
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, head_dim)
    out = scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(batch, new, heads, head_dim), None


AttentionInterface.register(ATTENTION, slot_attention)


class SlotCache(Cache):
    """Keys and values, per layer [slots, kv_heads, columns, head_dim], growing by doubling up to `max_columns`."""

    def __init__(
        self, config: PreTrainedConfig, slots: int, max_columns: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(layers=[])
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._shape = (slots, config.num_key_value_heads, min(_FIRST_COLUMNS, max_columns), head_dim)
        self._max_columns = max_columns
        # Zeros, not empty: masked columns get weight 0, and 0 times a NaN left in memory would be NaN.
        layers = range(config.num_hidden_layers)
        self._keys = [torch.zeros(self._shape, dtype=dtype, device=device) for _ in layers]
        self._values = [torch.zeros(self._shape, dtype=dtype, device=device) for _ in layers]
        self._write_prefill: tuple[slice, Tensor] | None = None
        self._rows = torch.empty(0, dtype=torch.int64)
        self._columns = torch.empty(0, dtype=torch.int64)
        self._width = 0

    def begin_prefill(self, slots: slice, source: Tensor, width: int) -> None:
        """The next forward has contexts [contexts, width], each starting at column 0; slot i gets row source[i]."""
        self._reserve(width)
        self._write_prefill = (slots, source)

    def begin_decode(self, columns: Tensor, width: int) -> None:
        """The next forward has one token for each slot 0 .. n-1, to be written at `columns` [n], all below `width`."""
        self._reserve(width)
        self._write_prefill = None
        self._rows = torch.arange(columns.shape[0], device=columns.device)
        self._columns, self._width = columns, width

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by each attention layer: store the new keys and values, return those to attend to."""
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        if self._write_prefill is not None:
            slots, source = self._write_prefill
            width = key_states.shape[2]
            keys[slots, :, :width] = key_states[source]
            values[slots, :, :width] = value_states[source]
            return key_states, value_states
        keys[self._rows, :, self._columns] = key_states.squeeze(2)
        values[self._rows, :, self._columns] = value_states.squeeze(2)
        count = self._rows.shape[0]
        return keys[:count, :, : self._width], values[:count, :, : self._width]

    def move(self, source: Tensor, target: Tensor, width: int) -> None:
        """Copy the first `width` columns of slots `source` into slots `target` (int64 [moved], disjoint)."""
        for tensor in (*self._keys, *self._values):
            tensor[target, :, :width] = tensor[source, :, :width]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0 in a prefill. In a decode step sequences differ, and their positions are always given explicitly."""
        return 0 if self._write_prefill is not None else self._width - 1

    def _reserve(self, columns: int) -> None:
        have = self._shape[2]
        if columns <= have:
            return
        assert columns <= self._max_columns, (columns, self._max_columns)
        self._shape = (*self._shape[:2], min(max(columns, 2 * have), self._max_columns), self._shape[3])
        for tensors in (self._keys, self._values):
            for layer, old in enumerate(tensors):
                tensors[layer] = old.new_zeros(self._shape)
                tensors[layer][:, :, :have] = old
