"""Constant factors on tokens: the weight slot.

Importance corrections for a sampler that is not quite the trained policy (another engine's rounding, older weights,
another temperature): with ``r = p_train(y) / mu(y)``, mu what the token was really drawn from,

    tis        min(r, c)                                                    truncated importance sampling
    icepop     r where low <= r <= high, otherwise 0
    sequence   1 where the geometric mean of r over the sequence is within [low, high], otherwise 0

The slot's default, `unit`, is the factor 1. Tokens that the sampler did not draw have no ratio and get the factor 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from nemo_opd.errors import ConfigError
from nemo_opd.losses.registry import register_weight
from nemo_opd.types import TokenBatch
from nemo_opd.vocab.objective import SampledScores
from nemo_opd.vocab.row import discounted_return, per_sequence

_ROUNDING = 1e-4
"""A share of a count that is a whole number must not become the next one by rounding."""

Metrics = Mapping[str, tuple[Tensor, Tensor]]


class TokenWeight(ABC):
    """A detached factor for every token's loss. Normalisers do not change with it: they count tokens."""

    name: ClassVar[str]
    metric_names: tuple[str, ...] = ("weight",)
    whole_row: bool = False
    """True when a token's factor depends on other tokens of its row; costs one more forward pass."""

    @abstractmethod
    def factors(self, scores: SampledScores, tokens: TokenBatch) -> tuple[Tensor, Metrics]:
        """Factor [tokens], and metrics by name: values [tokens] and the tokens on which they count."""


def log_ratio(scores: SampledScores, tokens: TokenBatch) -> tuple[Tensor, Tensor]:
    """(log of p_train(y) / mu(y), 0 where the sampler did not draw the token; where it did)."""
    drawn = tokens.sampler_logprobs.isfinite()
    sampler = torch.where(drawn, tokens.sampler_logprobs, 0.0).to(scores.student.dtype)
    return torch.where(drawn, scores.student - sampler, 0.0), drawn


def _bounds(low: float, high: float) -> None:
    if not 0.0 <= low < high:
        raise ConfigError("weight.low", f"{low} with high={high}", "0 <= low < high", "IcePop uses 0.5 and 5")


@register_weight("tis")
class TruncatedImportance(TokenWeight):
    """min(r, clamp): truncated importance sampling."""

    metric_names = ("weight", "importance_clipped")

    def __init__(self, clamp: float = 2.0) -> None:
        if clamp <= 0.0:
            raise ConfigError("weight.clamp", clamp, "a positive number", "2 is the usual bound")
        self.clamp = clamp

    def factors(self, scores: SampledScores, tokens: TokenBatch) -> tuple[Tensor, Metrics]:
        log_r, drawn = log_ratio(scores, tokens)
        factor = log_r.exp().clamp(max=self.clamp)
        clipped = (log_r.exp() > self.clamp).to(factor.dtype)
        return factor, {"weight": (factor, torch.ones_like(drawn)), "importance_clipped": (clipped, drawn)}


@register_weight("icepop")
class IcePop(TokenWeight):
    """r where it lies within [low, high], otherwise 0."""

    metric_names = ("weight", "importance_out_of_bounds")

    def __init__(self, low: float = 0.5, high: float = 5.0) -> None:
        _bounds(low, high)
        self.low, self.high = low, high

    def factors(self, scores: SampledScores, tokens: TokenBatch) -> tuple[Tensor, Metrics]:
        log_r, drawn = log_ratio(scores, tokens)
        ratio = log_r.exp()
        within = (ratio >= self.low) & (ratio <= self.high)
        factor = torch.where(drawn & ~within, 0.0, ratio)
        outside = (~within).to(factor.dtype)
        return factor, {"weight": (factor, torch.ones_like(drawn)), "importance_out_of_bounds": (outside, drawn)}


@register_weight("sequence")
class SequenceImportance(TokenWeight):
    """Drops sequences whose geometric mean of r is outside [low, high]; the others keep the factor 1."""

    metric_names = ("weight", "importance_out_of_bounds")
    whole_row = True

    def __init__(self, low: float = 0.5, high: float = 2.0) -> None:
        _bounds(low, high)
        self.low, self.high = low, high

    def factors(self, scores: SampledScores, tokens: TokenBatch) -> tuple[Tensor, Metrics]:
        log_r, drawn = log_ratio(scores, tokens)
        count = per_sequence(drawn.to(log_r.dtype), tokens)
        mean = (per_sequence(log_r, tokens) / count.clamp(min=1)).exp()
        within = (mean >= self.low) & (mean <= self.high)
        factor = within.to(log_r.dtype)
        return factor, {"weight": (factor, torch.ones_like(drawn)), "importance_out_of_bounds": (1 - factor, drawn)}


@register_weight("prefix")
class PrefixWeight(TokenWeight):
    """1 + gamma (1 - sum_{i<t} |A_i| / sum_i |A_i|), A = log q(y) - log p(y), over a sequence: early disagreement
    matters more (IW-OPD, arXiv 2606.22600). Needs log q of the written tokens; tokens without it count nothing."""

    whole_row = True

    def __init__(self, gamma: float = 0.5) -> None:
        if gamma < 0.0:
            raise ConfigError("weight.gamma", gamma, "at least 0", "0.5 is the paper's; 0 switches it off")
        self.gamma = gamma

    def factors(self, scores: SampledScores, tokens: TokenBatch) -> tuple[Tensor, Metrics]:
        if scores.teacher is None:
            raise TypeError(
                "weight prefix needs the teacher's log-probability of the written tokens, which this loss does not ask "
                "for; use it with policy_gradient, k2 or a loss that needs the whole distribution"
            )
        gap = torch.where(tokens.teacher_valid, scores.teacher - scores.student, 0.0).abs()
        total = per_sequence(gap, tokens)
        from_here = discounted_return(gap, tokens.teacher_valid, tokens, 1.0)
        before = torch.where(total > 0, (total - from_here) / total.clamp(min=torch.finfo(gap.dtype).tiny), 0.0)
        factor = 1.0 + self.gamma * (1.0 - before)
        return factor, {"weight": (factor, torch.ones_like(tokens.teacher_valid))}


@register_weight("entropy")
class EntropySelection(TokenWeight):
    """Keeps the share `keep` of a response's tokens at which the entropy is highest (REOPOLD, arXiv 2603.11137).

    A kept token gets the factor n / m, n the response's tokens and m those kept, so that factors average 1 within each
    response and normalisers, which count tokens, stay right. Tokens without a teacher score take no place. Which share
    is kept, and that it is ranked within a response rather than a batch, is a reconstruction.
    """

    metric_names = ("weight", "kept_entropy")
    whole_row = True

    def __init__(self, keep: float = 0.5, of: str = "student") -> None:
        if not 0.0 < keep <= 1.0:
            raise ConfigError("weight.keep", keep, "a share above 0, up to 1", "1 switches it off")
        if of not in ("student", "teacher"):
            raise ConfigError("weight.of", of, "student or teacher", "student is the paper's")
        self.keep, self.of = keep, of

    def factors(self, scores: SampledScores, tokens: TokenBatch) -> tuple[Tensor, Metrics]:
        entropy = scores.student_entropy if self.of == "student" else scores.teacher_entropy
        if entropy is None:
            raise TypeError("weight entropy of the teacher needs its whole distribution, which this loss does not ask")
        place, count = rank_in_sequence(entropy, tokens.teacher_valid, tokens)
        places = (self.keep * count - _ROUNDING).ceil().clamp(min=1.0)
        kept = tokens.teacher_valid & (place < places)
        factor = torch.where(kept, count / places, 0.0)
        return factor, {"weight": (factor, tokens.teacher_valid), "kept_entropy": (entropy, kept)}


def rank_in_sequence(values: Tensor, counted: Tensor, tokens: TokenBatch) -> tuple[Tensor, Tensor]:
    """(place of each token among the counted ones of its sequence, largest value first; their number), [tokens].

    Equal values are placed by their offset. A token that is not counted has a place behind all others.
    """
    order = tokens.offset.argsort(stable=True)
    order = order[values[order].argsort(descending=True, stable=True)]
    order = order[(~counted[order]).to(torch.int8).argsort(stable=True)]
    order = order[tokens.sequence[order].argsort(stable=True)]
    index = torch.arange(len(order), device=values.device)
    sequence = tokens.sequence[order]
    first = torch.ones_like(index, dtype=torch.bool)
    first[1:] = sequence[1:] != sequence[:-1]
    start = torch.where(first, index, 0).cummax(0).values
    place = torch.zeros_like(values)
    place[order] = (index - start).to(values.dtype)
    return place, per_sequence(counted.to(values.dtype), tokens)
