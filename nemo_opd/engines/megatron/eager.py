"""Norm, rotary embedding and gated activation in as few passes over memory as torch's eager kernels allow.

Composed of torch's operations, each of these costs a CPU about as much as the matrix product beside it: every
operation reads and writes its whole input, backward as well. Here backward is written by hand, intermediate results
are overwritten, and what is cheap is computed again instead of kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_EXACT = (torch.float32, torch.float64)
"""Precisions in which sums of squares may be accumulated as they are."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension."""
    if x.dtype not in _EXACT or x.dtype != weight.dtype:
        return F.rms_norm(x, weight.shape, weight, eps)
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """With r = 1 / sqrt(mean(x^2) + eps) and g = weight * grad:
    dx = r (g - x r^2 mean(g x)), dweight = sum over rows of grad * x * r."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        unit = x * inverse
        dweight = dx = None
        if ctx.needs_input_grad[1]:
            dweight = (grad * unit).flatten(0, -2).sum(0)
        if ctx.needs_input_grad[0]:
            dx = grad * weight
            mean = torch.linalg.vecdot(dx, unit).unsqueeze(-1).div_(x.shape[-1])
            dx = dx.addcmul_(unit, mean, value=-1.0).mul_(inverse)
        return dx, dweight, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding: the pairs (x_i, x_{i + head_dim / 2}) turned by their angles.

    Args:
        x: [row, heads, head_dim].
        cos: [row, 1, head_dim], the angles' cosines, the second half equal to the first.
        sin: [row, 1, head_dim / 2].
    """
    return _Rotation.apply(x, cos, sin)


class _Rotation(torch.autograd.Function):
    """Backward turns the gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin, -1.0), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin, value=-sign)
    out[..., half:].addcmul_(x[..., :half], sin, value=sign)
    return out


def swiglu(x: Tensor) -> Tensor:
    """[..., 2 ffn] -> [..., ffn]: ``silu(first half) * second half``. Without gradients `x` is overwritten."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _SwiGLU.apply(x)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate, inplace=True).mul_(up)


class _SwiGLU(torch.autograd.Function):
    """Keeps its input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        out = torch.empty_like(x)
        dgate, dup = out.chunk(2, dim=-1)
        torch.mul(F.silu(gate), grad, out=dup)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=dgate)
        return out
