"""A moving average of the student's weights on the student's own shards: what an `ema` teacher is made of.

    theta_T <- decay theta_T + (1 - decay) theta        after every step that was not skipped

theta are the weights that the student computes with. The average is kept in fp32 (float64 for a float64 student)
whatever their dtype: a twentieth of one step would be rounded away in bfloat16. Every rank averages its own shards, so
nothing is communicated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    make_sharded_optimizer_tensor,
)
from torch import Tensor

from nemo_opd.engines.megatron.model import ModelChunks

_PREFIX = "teacher.average"
"""Before the names of the average's tensors in a checkpoint."""


class WeightAverage:
    """Keeps a model at the moving average of another one of the same layout.

    Args:
        model: holds the average in its own dtype, ready to score; its present weights are where the average starts.
        decay: share of the average that stays at a step, in [0, 1].
    """

    def __init__(self, model: ModelChunks, decay: float) -> None:
        self.model = model.requires_grad_(False).eval()
        self._decay = decay
        self._exact = [_exact(parameter) for parameter in model.parameters()]

    @torch.no_grad()
    def update(self, student: torch.nn.Module) -> None:
        """Move towards the student's present weights. `student` has the parameters of `model`, in their order."""
        for exact, theirs in zip(self._exact, student.parameters(), strict=True):
            exact.lerp_(theirs.to(exact.dtype), 1.0 - self._decay)
        self._show()

    def sharded_state(self, metadata: dict[str, Any]) -> dict[int, Any]:
        """For `megatron.core.dist_checkpointing`: the exact average, which can be read back under another layout."""
        weights: Any = self.model.sharded_state_dict(metadata)
        shards = get_param_id_to_sharded_param_map(weights, self.model.parameters())
        return {n: make_sharded_optimizer_tensor(shards[n], exact, _PREFIX) for n, exact in enumerate(self._exact)}

    @torch.no_grad()
    def load_state(self, state: Mapping[int, Tensor]) -> None:
        """Take back what `sharded_state` described and the checkpoint filled in."""
        for n, exact in enumerate(self._exact):
            exact.copy_(state[n])
        self._show()

    @staticmethod
    def is_in(names: Iterable[str]) -> bool:
        """Does a checkpoint with tensors of these names hold an average?"""
        return any(name.startswith(f"{_PREFIX}.") for name in names)

    def _show(self) -> None:
        for parameter, exact in zip(self.model.parameters(), self._exact, strict=True):
            if parameter.data_ptr() != exact.data_ptr():
                parameter.copy_(exact)


def _exact(parameter: torch.nn.Parameter) -> Tensor:
    """The parameter itself where it is exact enough, otherwise a copy in fp32."""
    return parameter.data if parameter.dtype in (torch.float32, torch.float64) else parameter.detach().float()
