"""What a layer keeps of every position until its backward pass, tensor by tensor.

Two sets of kernels: `local`, Megatron's local layer spec with our norm and attention, which runs on CPU and is compared
with what autograd and torch's allocator really keep (`test_memory.py` and `test_peak.py` in tests/unit/planning); and
`te`, Transformer Engine's, for GPUs. The second follows from the same modules and is compared with nothing yet.
"""

from __future__ import annotations

from typing import Literal

from nemo_opd.planning.fp8 import Fp8
from nemo_opd.planning.shapes import ModelShape, Spread

Kernels = Literal["local", "te"]
_FP32 = 4


def layer_activations(
    shape: ModelShape,
    spread: Spread,
    width: int,
    kernels: Kernels = "te",
    selective: bool = False,
    fp8: Fp8 | None = None,
) -> dict[str, float]:
    """Bytes for each position that is held of a row, by what they are for; `width` is that of a number; `selective`:
    attention is computed again in backward; `fp8`: of a layer whose matrix products are in FP8."""
    outside = spread.sequence
    given, answer = (width, 0.0) if fp8 is None else (fp8.saved, fp8.answer)  # of what its linear layers are given
    kept = {
        "norm before attention": _norm(shape.hidden, width, kernels) / outside,
        "input of the attention": given * shape.hidden / outside,
        "attention": (_attention(shape, width, spread.tp, kernels, selective) + answer * shape.query) / spread.tp,
        "norm before the feed-forward": _norm(shape.hidden, width, kernels) / outside,
        "input of the feed-forward": given * shape.hidden / outside,
    }
    if not shape.experts:
        gated = width * _gated(shape.ffn, kernels) + (given - width) * shape.ffn
        return {**kept, "feed-forward": gated / spread.tp}
    return {**kept, "router": 2 * _FP32 * shape.experts / outside, "experts": _experts(shape, width, kernels) / outside}


def layer_input(shape: ModelShape, spread: Spread, width: int) -> float:
    """Bytes for each position that are kept of a layer which is computed again in backward: its input."""
    return width * shape.hidden / spread.sequence


def final_norm(shape: ModelShape, spread: Spread, width: int, kernels: Kernels = "te") -> float:
    """Bytes for each position that the last stage keeps besides its layers: the norm's input and output."""
    return (_norm(shape.hidden, width, kernels) + width * shape.hidden) / spread.sequence


def rotation_table(shape: ModelShape, width: int, kernels: Kernels = "te") -> float:
    """Bytes for each position of the rotary angles' cosines and sines, which all layers share."""
    return 1.5 * shape.head * width if kernels == "local" else 0.0


def layer_backward(shape: ModelShape, spread: Spread, width: int, row: float, kernels: Kernels = "te") -> float:
    """Bytes that backward through one layer of a row adds to what is kept, at most.

    The feed-forward comes first and so finds the most: of its product the gradient, and of gate and up that and one
    more, while the product itself is gone; and on the way in the gradient of one of its matrices.
    """
    residual = row * width * shape.hidden / spread.sequence
    gathered = row * width * shape.hidden if spread.sequence_parallel else 0.0
    if shape.experts:
        return residual + row * _experts_backward(shape, spread, width, kernels) / spread.sequence
    ffn = row * width * shape.ffn / spread.tp
    matrix = width * shape.hidden * shape.ffn / spread.tp
    received = row * width * _received(shape, spread)
    return residual + received + max(3 * ffn, gathered + ffn + matrix)


def _received(shape: ModelShape, spread: Spread) -> float:
    """Keys and values of the positions that other ranks hold."""
    return (spread.cp - 1) * 2 * shape.key_value / spread.tp


def passing(shape: ModelShape, spread: Spread, width: int, kernels: Kernels = "te") -> float:
    """Bytes for each position of what exists only while one layer is computed forward, without gradients."""
    outside = width * (4 * shape.hidden / spread.sequence + _received(shape, spread))
    if shape.experts:
        inside = _experts(shape, width, kernels) / spread.sequence
    else:
        inside = width * _gated(shape.ffn, kernels) / spread.tp
    return outside + max(inside, _attending(shape, width, kernels) / spread.tp)


def _attending(shape: ModelShape, width: int, kernels: Kernels) -> float:
    """Query, key and value, projected, after norm and rotation, and the answer; our own repeats key and value, and
    torch's kernel adds up shorter numbers in fp32."""
    query, key_value = shape.query, shape.key_value
    made = width * (query + 2 * key_value + 2 * (query + key_value) + query)
    if kernels == "te":
        return made
    return made + 2 * width * query + (5 * query if width < _FP32 else 0)


def _norm(size: int, width: int, kernels: Kernels) -> float:
    """Its input and one number per position; the local one keeps input and quotient in fp32 where both are shorter."""
    short = kernels == "local" and width < _FP32
    return (2 * _FP32 if short else width) * size + _FP32


def _gated(size: int, kernels: Kernels) -> int:
    """Numbers kept of gate and up (one tensor) and their product; without our activation also up with its offset, and
    the gate's activation."""
    return (3 if kernels == "local" else 5) * size


def _attention(shape: ModelShape, width: int, tp: int, kernels: Kernels, selective: bool) -> float:
    """Query, key and value before and after norm and rotation, the answer, and its normaliser for each head. For all
    ranks together. With `selective` what attention is given stays instead of what it makes; for Transformer Engine,
    whose attention makes little more than its answer, that is taken for the same."""
    query, key_value = shape.query, shape.key_value
    fused = query + 2 * key_value
    cut = query if shape.groups > tp else 0  # queries of several groups are copied out of the projection
    if kernels == "te":  # value is a part of the fused projection, which is kept whole
        return width * (fused + query + key_value + query + (cut if shape.qk_norm else 0)) + _FP32 * shape.heads
    kept, short = 0.0, width < _FP32
    if shape.qk_norm:  # in the weights' dtype the key is a part of the projection
        kept += 2 * _FP32 * (query + key_value) if short else width * (cut + fused)
        kept += _FP32 * (shape.heads + shape.groups)
    if selective:
        given = query + key_value + (fused if short else 0) if shape.qk_norm else cut + fused
        return kept + width * (given + query)
    repeated = shape.heads > shape.groups
    kept += _FP32 * shape.heads
    kept += width * (3 * query if repeated else query + key_value + (0 if shape.qk_norm and not short else fused))
    return kept + width * query


def _experts(shape: ModelShape, width: int, kernels: Kernels) -> float:
    """For each of a token's experts its copy on the way in, what the expert's feed-forward keeps, and its product once
    more, before the router's weight; load is even."""
    return shape.experts_per_token * width * (shape.hidden + _gated(shape.expert_ffn, kernels) + shape.expert_ffn)


def _experts_backward(shape: ModelShape, spread: Spread, width: int, kernels: Kernels) -> float:
    """For each of a token's experts the gradients of its input and output; the router's weight is applied in fp32, for
    all experts at once or (local) for one after the other."""
    sides = 2 * width * shape.hidden
    inside = (2 * width + 2 * _FP32) * shape.expert_ffn
    at_once = spread.ep / shape.experts if kernels == "local" else 1.0
    return shape.experts_per_token * (sides + inside * at_once)
