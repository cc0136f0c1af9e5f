"""The three matrix products of an output layer, and where its gradient goes.

Logits are float32 (float64 for float64 models) whatever the weights are: with bfloat16 matrices the product is
accumulated and returned in float32 where the device can (CUDA), and computed from float32 copies of a few rows at a
time where it cannot (CPU). Gradient matrices are multiplied in the dtype of the weights and accumulated in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_opd.vocab.shard import VocabShard

CAST_ROWS = 8192
"""Rows of a half-precision matrix that are raised to float32 at a time where no mixed product exists."""


@dataclass(frozen=True)
class OutputLayer:
    """A model's output layer as this rank holds it."""

    weight: Tensor
    """[local rows, hidden]"""
    shard: VocabShard

    def __post_init__(self) -> None:
        if self.weight.ndim != 2 or self.weight.shape[0] != self.shard.length:
            raise ValueError(
                f"output layer of shape {tuple(self.weight.shape)}; expected [{self.shard.length}, hidden] for "
                f"{self.shard}"
            )
        if self.weight.dtype not in (torch.float64, torch.float32, torch.bfloat16):
            raise ValueError(
                f"output layer in {self.weight.dtype}; expected bfloat16, float32 or float64 (float16 cannot hold the "
                f"gradient of a mean over many tokens; use bfloat16)"
            )

    @property
    def rows(self) -> Tensor:
        """[valid rows, hidden]: the weight without its padding."""
        return self.weight.detach()[: self.shard.valid]

    @property
    def logits_dtype(self) -> torch.dtype:
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32


def logits_into(out: Tensor, hidden: Tensor, rows: Tensor) -> None:
    """out[tokens, rows] = hidden[tokens, h] @ rows[rows, h]^T, in the dtype of `out` (float32 or float64)."""
    if hidden.dtype == out.dtype and rows.dtype == out.dtype:
        torch.mm(hidden, rows.t(), out=out)
    elif hidden.is_cuda and hidden.dtype == rows.dtype:
        torch.mm(hidden, rows.t(), out_dtype=out.dtype, out=out)
    else:
        raised = hidden.to(out.dtype)
        for start in range(0, rows.shape[0], CAST_ROWS):
            part = rows[start : start + CAST_ROWS].to(out.dtype)
            torch.mm(raised, part.t(), out=out[:, start : start + CAST_ROWS])


def hidden_gradient(dlogits: Tensor, rows: Tensor, out: Tensor) -> None:
    """out[tokens, h] = dlogits[tokens, rows] @ rows[rows, h]; `out` has the dtype in which it is wanted."""
    if rows.shape[0] == 0:
        out.zero_()
    elif rows.dtype == dlogits.dtype == out.dtype:
        torch.mm(dlogits, rows, out=out)
    elif dlogits.is_cuda:
        out.copy_(torch.mm(dlogits.to(rows.dtype), rows))
    else:
        total = torch.zeros(out.shape, dtype=dlogits.dtype, device=out.device)
        for start in range(0, rows.shape[0], CAST_ROWS):
            total.addmm_(dlogits[:, start : start + CAST_ROWS], rows[start : start + CAST_ROWS].to(dlogits.dtype))
        out.copy_(total)


def add_weight_gradient(total: Tensor, dlogits: Tensor, hidden: Tensor) -> None:
    """total[rows, h] += dlogits[tokens, rows]^T @ hidden[tokens, h], accumulated in the dtype of `total`."""
    if total.shape[0] == 0:
        return
    if total.dtype == dlogits.dtype and hidden.dtype == dlogits.dtype:
        total.addmm_(dlogits.t(), hidden)
    elif dlogits.is_cuda and total.dtype == torch.float32:
        torch.addmm(total, dlogits.to(hidden.dtype).t(), hidden, out_dtype=torch.float32, out=total)
    elif total.dtype == dlogits.dtype:
        total.addmm_(dlogits.t(), hidden.to(dlogits.dtype))
    else:
        total.add_(torch.mm(dlogits.t(), hidden.to(dlogits.dtype)))


class WeightGradient:
    """Where the gradient of an output layer is gathered while the chunks pass.

    With Megatron's ``weight.main_grad`` (its distributed data parallel allocates it, in float32 when asked to) the
    chunks are added there at once, although backward has not been called yet: what backward will hand to the loss must
    then be known beforehand, and is checked when it comes (`finish`). Otherwise a buffer is returned through autograd.
    """

    def __init__(self, weight: Tensor, shard: VocabShard, scale: float) -> None:
        self.weight, self.valid = weight, shard.valid
        self.main_grad: Tensor | None = getattr(weight, "main_grad", None)
        self.scale = scale if self.main_grad is not None else 1.0
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self._total: Tensor | None = (
            self.main_grad
            if self.main_grad is not None
            else torch.zeros(weight.shape, dtype=dtype, device=weight.device)
        )

    def add(self, dlogits: Tensor, hidden: Tensor) -> None:
        """Add one chunk; `dlogits` [tokens, valid rows] already carries `scale`."""
        assert self._total is not None
        add_weight_gradient(self._total[: self.valid], dlogits, hidden)

    def finish(self, grad_loss: Tensor) -> Tensor:
        """What backward returns for the weight.

        Raises:
            RuntimeError: ``main_grad`` was filled with another scale than backward arrives with, or backward ran twice.
        """
        if self._total is None:
            raise RuntimeError("backward of the fused loss ran twice; its gradients exist once, run the loss again")
        if self.main_grad is None:
            total, self._total = self._total.mul_(grad_loss), None
            return total.to(self.weight.dtype)
        self._total = None
        expect_scale(grad_loss, self.scale)
        self.weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        # The hook of Megatron's data parallel fires on a gradient and ignores it; zeros, because an embedding that
        # shares this weight adds its own gradient to it.
        return torch.zeros_like(self.weight)


def expect_scale(grad_loss: Tensor, scale: float) -> None:
    """Refuse a gradient other than the one that was announced. On CUDA the check does not wait for the device."""
    if grad_loss.is_cuda:
        torch._assert_async(grad_loss == scale, f"backward of the fused loss expected the gradient {scale}")
    elif float(grad_loss) != scale:
        raise RuntimeError(
            f"backward of the fused loss arrived with gradient {float(grad_loss)}, but {scale} was announced and is "
            f"already in weight.main_grad; pass grad_scale={float(grad_loss)} to fused_loss"
        )
