"""What FP8 changes of a plan: bytes of weights and of what layers keep for backward, and how many layers have it.

From the documentation and source of Transformer Engine 2 and from Megatron-core 0.16, seen on no GPU:

- Backward reads weights and inputs along columns. Hopper's products cannot: each tensor has a transposed copy besides;
  Blackwell's can, so there one copy of a tensor with one scale serves both. Scales of blocks differ by direction, so
  `blockwise` and `mxfp8` have two copies everywhere (docs/features/low_precision_training: performance_considerations,
  fp8_blockwise_scaling, mxfp8).
- Weights that stay in bf16 are cast once a step and kept for all micro-batches in a workspace of the module, along both
  directions, or along rows alone where no gradient is asked for (pytorch/module/linear.py, `get_weight_workspace`;
  Megatron's extensions/transformer_engine.py asks for it by `is_first_microbatch`).
- Of its input a linear layer keeps one copy in FP8. Attention keeps its answer in bf16 itself; Megatron has the output
  projection read that one, but with `delayed` a copy in FP8 is kept besides (transformer/attention.py).
- Blackwell computes `blockwise` as `mxfp8`.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_opd.config import FP8Config
from nemo_opd.planning.gpus import Gpu

_SCALES: dict[str, tuple[float, float]] = {
    "none": (0.0, 0.0),
    "delayed": (0.0, 0.0),
    "tensorwise": (0.0, 0.0),
    "blockwise": (4 / 128**2, 4 / 128),
    "mxfp8": (1 / 32, 1 / 32),
}
"""Bytes of scales for each number of (weights, activations), along one direction; one of a tensor is nothing."""


@dataclass(frozen=True)
class Fp8:
    """FP8 of one model on one kind of GPU. Without a recipe no layer has it."""

    config: FP8Config
    gpu: Gpu

    @property
    def recipe(self) -> str:
        """The one that runs."""
        return "mxfp8" if self.config.recipe == "blockwise" and self.gpu.blackwell else self.config.recipe

    @property
    def directions(self) -> int:
        """Copies of a tensor that backward reads too."""
        return 1 if self.recipe in ("delayed", "tensorwise") and self.gpu.blackwell else 2

    @property
    def weight(self) -> float:
        """Bytes of a weight in FP8 with its scale, along one direction: all that a forward pass alone needs."""
        return 1 + _SCALES[self.recipe][0]

    @property
    def trained(self) -> float:
        """Bytes of a weight in FP8 for forward and backward."""
        return self.directions * self.weight

    @property
    def saved(self) -> float:
        """Bytes of a number of a linear layer's input, as kept for backward."""
        return 1 + _SCALES[self.recipe][1]

    @property
    def answer(self) -> float:
        """Bytes of a number of attention's answer that the output projection keeps besides."""
        return self.saved if self.recipe == "delayed" else 0.0

    @property
    def gradient(self) -> float:
        """Bytes of a number of an output's gradient, as the two products of backward read it."""
        return self.directions * self.saved

    def gathered(self, width: int) -> float:
        """Bytes of a weight as replicas gather it, with `param_gather`: of what runs as mxfp8 Megatron gathers bf16 and
        casts then (distributed/param_and_grad_buffer.py)."""
        return width if not self.config.param_gather or self.recipe == "mxfp8" else 1

    def layers(self, layers: int, pp: int, stage: int, vp: int = 1) -> int:
        """Of this pipeline stage's layers, in `vp` chunks, those in FP8; `layers`: of all stages."""
        if self.config.recipe == "none":
            return 0
        start, end = self.config.bf16_layers()
        each = layers // (pp * vp)
        begins = [each * (chunk * pp + stage) for chunk in range(vp)]
        return sum(max(0, min(layers - end, begin + each) - max(start, begin)) for begin in begins)

    def fewest(self, layers: int, pp: int, vp: int = 1) -> int:
        """Of the stage that has the fewest, which sets the pace."""
        return min(self.layers(layers, pp, stage, vp) for stage in range(pp))
