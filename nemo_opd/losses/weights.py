"""Constant factors on tokens: the weight slot."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from nemo_opd.types import TokenBatch
from nemo_opd.vocab.objective import SampledScores


class TokenWeight(ABC):
    """A detached factor for every token's loss. Normalisers do not change with it: they count tokens."""

    name: ClassVar[str]
    metric_names: tuple[str, ...] = ()
    whole_row: bool = False
    """True when a token's factor depends on other tokens of its row; costs one more forward pass."""

    @abstractmethod
    def factors(self, scores: SampledScores, tokens: TokenBatch) -> tuple[Tensor, Mapping[str, tuple[Tensor, Tensor]]]:
        """Factor [tokens], and metrics by name: values [tokens] and the tokens on which they count."""
