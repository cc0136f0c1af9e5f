"""A divergence over the whole vocabulary for the fused loss on a machine without NeMo.

`nemo_opd.losses` are NeMo modules; what `nemo_opd.vocab.fused` computes of them is their hand-written divergence, which
is named here alone: the same kernels, without the module around it and its share of dropped tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nemo_opd.types import Need, TeacherNeeds, TokenBatch
from nemo_opd.vocab.objective import FullDivergence

DIVERGENCES = {
    "reverse_kl": FullDivergence("reverse"),
    "forward_kl": FullDivergence("forward"),
    "jsd": FullDivergence("jsd", 0.5),
}
"""By the names of the losses that they are."""


class BareDivergence:
    """A `nemo_opd.vocab.objective.Objective` that has a hand-written backward and nothing else."""

    needs = TeacherNeeds(Need.FULL)
    few = beside = None
    zero_at_match = True
    whole_row = False
    coefficients: Mapping[str, float] = {}
    unweighted: frozenset[str] = frozenset()
    parts: tuple[Any, ...] = ()
    metric_names: tuple[str, ...] = ()

    def __init__(self, name: str) -> None:
        self.name, self.components, self.divergence = name, (name,), DIVERGENCES[name]

    def component_masks(self, tokens: TokenBatch) -> dict[str, Tensor]:
        return {self.name: tokens.teacher_valid}

    def token_metrics(self, tokens: TokenBatch) -> dict[str, tuple[Tensor, Tensor]]:
        return {}

    def prepare(self, scores: object, tokens: TokenBatch) -> None:
        return None

    def evaluate(self, *_: object) -> Any:
        raise RuntimeError(f"{self.name} was asked for autograd; expected the hand-written backward")

    evaluate_few = evaluate
