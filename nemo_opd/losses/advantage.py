"""Advantages: one number of the token that was written, never one of a distribution.

By construction: `Advantage.values` is handed log-probabilities of written tokens, and no view of a distribution.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from nemo_opd.errors import ConfigError
from nemo_opd.types import TokenBatch
from nemo_opd.vocab.objective import SampledScores
from nemo_opd.vocab.row import discounted_return

NO_DISTRIBUTIONS = (
    "a sum over the vocabulary or a support is the same number whichever token was drawn, so as an advantage at its "
    "own position its expected gradient is zero (sum over v of grad p_v times a constant)"
)


class Advantage(ABC):
    """How good it was to write a token. Detached; positive means more of it."""

    @abstractmethod
    def values(self, scores: SampledScores, tokens: TokenBatch) -> Tensor:
        """[tokens], in nats or in units of the verifier's reward."""


class SampledReverseKL(Advantage):
    """-(log p(y) - log q(y)), p the trainer's student: one sample of -KL(p || q)."""

    def values(self, scores: SampledScores, tokens: TokenBatch) -> Tensor:
        assert scores.teacher is not None
        return scores.teacher - scores.student


ADVANTAGES: dict[str, type[Advantage]] = {"sampled_reverse_kl": SampledReverseKL}


def as_advantage(source: object) -> Advantage:
    """The advantage that a name or an object stands for.

    Raises:
        TypeError: a loss of a distribution (or anything else that is no `Advantage`) was passed.
        ConfigError: an unknown name, or that of a loss of a distribution.
    """
    if isinstance(source, Advantage):
        return source
    if isinstance(source, str) and source in ADVANTAGES:
        return ADVANTAGES[source]()
    if not isinstance(source, str):
        raise TypeError(
            f"{type(source).__name__} is no Advantage: {NO_DISTRIBUTIONS}; minimise it as a loss instead, or use "
            f"{', '.join(ADVANTAGES)}"
        )
    raise ConfigError(
        "loss.advantage",
        source,
        f"one of {', '.join(ADVANTAGES)}",
        f"{NO_DISTRIBUTIONS}; to minimise a divergence of distributions put its name in loss.name",
    )


def shape_advantage(
    values: Tensor,
    counted: Tensor,
    tokens: TokenBatch,
    clip: float | None,
    floor: float | None,
    discount: float,
    length_normalised: bool,
) -> Tensor:
    """Clip, floor and accumulate advantages [tokens], in this order.

    Args:
        clip: bounds |A|; None does not.
        floor: lambda of REOPOLD (arXiv 2603.11137): A is at least ``log(lambda / (1 - lambda))``; None does not.
        discount: gamma of the return ``sum_{s >= t} gamma^(s - t) A_s`` within a sequence; 0 keeps A_t alone.
        length_normalised: divides the return by ``sum_{s >= t} gamma^(s - t)``, a (weighted) mean over the rest of the
            sequence (MiniLLM, arXiv 2306.08543).
    """
    if clip is not None:
        values = values.clamp(-clip, clip)
    if floor is not None:
        values = values.clamp(min=math.log(floor / (1.0 - floor)))
    if discount == 0.0:
        return values
    total = discounted_return(values, counted, tokens, discount)
    if not length_normalised:
        return total
    terms = discounted_return(torch.ones_like(values), counted, tokens, discount)
    return total / torch.where(counted, terms, 1.0)
