"""What a layer keeps of every position until its backward pass, tensor by tensor.

Two sets of kernels: `local`, Megatron's local layer spec with our norm and attention, which runs on CPU and is compared
with what autograd really keeps (`tests/unit/planning/test_memory.py`); and `te`, Transformer Engine's, for GPUs. The
second follows from the same modules and is compared with nothing yet.
"""

from __future__ import annotations

from typing import Literal

from nemo_opd.planning.shapes import ModelShape, Spread

Kernels = Literal["local", "te"]
_FP32 = 4


def layer_activations(shape: ModelShape, spread: Spread, width: int, kernels: Kernels = "te") -> dict[str, float]:
    """Bytes for each position that is held of a row, by what they are for; `width` is that of a number."""
    outside = spread.sequence
    kept = {
        "norm before attention": _norm(shape.hidden, width, kernels) / outside,
        "input of the attention": width * shape.hidden / outside,
        "attention": _attention(shape, width, kernels) / spread.tp,
        "norm before the feed-forward": _norm(shape.hidden, width, kernels) / outside,
        "input of the feed-forward": width * shape.hidden / outside,
    }
    if not shape.experts:
        return {**kept, "feed-forward": width * _gated(shape.ffn, kernels) / spread.tp}
    return {**kept, "router": 2 * _FP32 * shape.experts / outside, "experts": _experts(shape, width, kernels) / outside}


def layer_input(shape: ModelShape, spread: Spread, width: int) -> float:
    """Bytes for each position that are kept of a layer which is computed again in backward: its input."""
    return width * shape.hidden / spread.sequence


def passing(shape: ModelShape, spread: Spread, width: int, kernels: Kernels = "te") -> float:
    """Bytes for each position of what exists only while one layer is computed, forward or backward."""
    if shape.experts:
        return width * 2 * shape.hidden / spread.sequence + _experts(shape, width, kernels) / spread.sequence
    received = (spread.cp - 1) * 2 * shape.key_value  # keys and values of the positions that other ranks hold
    return width * (2 * shape.hidden / spread.sequence + (received + _gated(shape.ffn, kernels)) / spread.tp)


def _norm(size: int, width: int, kernels: Kernels) -> float:
    """Its input and one number per position; the local one keeps input and quotient in fp32 where both are shorter."""
    short = kernels == "local" and width < _FP32
    return (2 * _FP32 if short else width) * size + _FP32


def _gated(size: int, kernels: Kernels) -> int:
    """Numbers kept of gate and up (one tensor) and their product; without our activation also up with its offset, and
    the gate's activation."""
    return (3 if kernels == "local" else 5) * size


def _attention(shape: ModelShape, width: int, kernels: Kernels) -> float:
    """Query, key and value before and after norm and rotation, the answer, and its normaliser for each head."""
    query, key_value = shape.query, shape.key_value
    fused = query + 2 * key_value
    if kernels == "te":  # value is a part of the fused projection, which is kept whole
        return width * (fused + query + key_value + query) + _FP32 * shape.heads
    kept: float = _FP32 * shape.heads
    short = width < _FP32
    if shape.qk_norm:  # in the weights' dtype the query is a copy, the key a part of the projection
        kept += 2 * _FP32 * (query + key_value) if short else width * (query + fused)
        kept += _FP32 * (shape.heads + shape.groups)
    repeated = shape.heads > shape.groups
    kept += width * (3 * query if repeated else query + key_value + (0 if shape.qk_norm and not short else fused))
    return kept + width * query


def _experts(shape: ModelShape, width: int, kernels: Kernels) -> float:
    """For each of a token's experts its copy on the way in and out, and the expert's feed-forward; load is even."""
    return shape.experts_per_token * width * (2 * shape.hidden + _gated(shape.expert_ffn, kernels))
