"""One chunk of tokens on its way through the fused path: what goes in, what comes out."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_opd.types import Need, TokenBatch
from nemo_opd.vocab.collectives import Pending
from nemo_opd.vocab.objective import Objective, SampledScores, Weighting
from nemo_opd.vocab.overlap import OVERLAP, is_measurable
from nemo_opd.vocab.partial import PartialView
from nemo_opd.vocab.shard import VocabShard
from nemo_opd.vocab.statistics import Scratch, Statistics

Metrics = dict[str, tuple[Tensor, Tensor]]
"""By name: detached values [tokens], and bool [tokens] where they count."""

IMPORTANCE_BOUNDS = (0.5, 2.0)
"""Outside of these an importance ratio counts as out of bounds, unless the weight has bounds of its own and reports
its own `importance_out_of_bounds`. 2 is where truncated importance sampling cuts by default."""
POSITIONS = (0, 16, 64, 256, 1024, 4096, 16384)
"""Response offsets at which the buckets of `teacher_logprob_from_*` begin."""


@dataclass
class Chunk:
    """Logits of both models for some tokens, and all that turns a loss per token into a number."""

    student: Tensor
    """[tokens, valid columns], float32 or float64. A buffer: whoever computes the loss may overwrite it."""
    teacher: Tensor | None
    """The same for a teacher that answered hidden states."""
    shard: VocabShard
    tokens: TokenBatch
    masks: Mapping[str, Tensor]
    """bool [tokens] per component"""
    normalisers: Mapping[str, float]
    objective: Objective
    weighting: Weighting | None
    factors: Tensor | None
    """[tokens] factors that were found for the whole row; None where `weighting` gives them chunk by chunk"""
    prepared: Tensor | None
    """[tokens] what `objective.prepare` found for the whole row"""
    scale: float
    gradient: bool
    scratch: Scratch
    picked: Tensor
    """int64 [any], the tokens on which the overlap of top sets is measured"""

    def weights(self, scores: SampledScores) -> tuple[dict[str, Tensor], Metrics]:
        """For each component the factor of every token's loss (mask x weight x coefficient); the weight's metrics."""
        factors, metrics = self.factors, {}  # type: Tensor | None, Mapping[str, tuple[Tensor, Tensor]]
        if factors is None and self.weighting is not None:
            factors, metrics = self.weighting.factors(scores, self.tokens)
        dtype = self.student.dtype
        weights = {}
        for name, mask in self.masks.items():
            weight = mask.to(dtype)
            if factors is not None and name not in self.objective.unweighted:
                weight = torch.where(mask, factors.to(dtype), 0.0)
            weights[name] = weight * self.objective.coefficients.get(name, 1.0)
        return weights, dict(metrics)

    def total(self, losses: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Tensor:
        """The chunk's share of the scalar that is differentiated: ``scale x sum of w l / normaliser``."""
        total = self.student.new_zeros(())
        for name, loss in losses.items():
            factor = weights[name] * (self.scale / self.normalisers[name])
            total = total + (factor * torch.where(self.masks[name], loss, 0.0)).sum()
        return total

    def scores(self, found: Statistics) -> SampledScores:
        """What is known of the written tokens."""
        teacher = self.tokens.teacher_sampled_logprobs if self.teacher is None else found.teacher_written
        if self.objective.needs.need == Need.NOTHING:
            teacher = None
        return SampledScores(found.student_written, teacher, found.student_entropy, found.teacher_entropy)

    def constants(self, scores: SampledScores) -> Tensor | None:
        """What the objective prepares: for the row if it asked for that, otherwise for this chunk."""
        return self.prepared if self.objective.whole_row else self.objective.prepare(scores, self.tokens)

    def served(self) -> PartialView:
        """The view of a teacher that answered scores."""
        tokens = self.tokens
        return PartialView(
            self.shard.vocab_size,
            tokens.ids,
            tokens.teacher_sampled_logprobs,
            tokens.teacher_ids,
            tokens.teacher_id_logprobs,
            ranked=self.objective.needs.need == Need.TOP_K,
        )


@dataclass
class ChunkResult:
    """What remains of a chunk."""

    losses: Mapping[str, Tensor]
    """Detached [tokens] per component, before weights"""
    weights: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    metrics: Metrics
    dlogits: Tensor | None
    """[tokens, valid columns]: gradient of ``scale x sum of w l / normaliser`` with respect to the local logits;
    usually the buffer that held the logits."""


Method = Generator[Pending, None, ChunkResult]
"""How a chunk is computed: a generator that hands out each collective it started before it needs the result, so that
the caller can do something else meanwhile."""


def always_measured(objective: Objective) -> tuple[str, ...]:
    """Metrics that every loss reports, by what its teacher answers."""
    need = objective.needs.need
    names = ["student_entropy", "importance_ratio", "importance_out_of_bounds"]
    if need in (Need.SAMPLED, Need.FULL):
        names += ["sampled_kl", "teacher_logprob", *(f"teacher_logprob_from_{start}" for start in POSITIONS)]
    if need == Need.FULL:
        names += ["kl", "teacher_entropy"]
    if is_measurable(objective):
        names.append(OVERLAP)
    return tuple(names)


def standard_metrics(scores: SampledScores, kl: Tensor | None, tokens: TokenBatch) -> Metrics:
    """The always-on metrics of a chunk: `kl` is KL(p || q) where the whole teacher is known, `sampled_kl` its
    one-sample estimate log p(y) - log q(y), `teacher_logprob` is log q(y), `importance_ratio` p(y) over the sampler's
    probability and `importance_out_of_bounds` 1 where that is outside `IMPORTANCE_BOUNDS`."""
    everywhere = torch.ones_like(tokens.teacher_valid)
    drawn = torch.isfinite(tokens.sampler_logprobs)
    ratio = torch.where(drawn, (scores.student - tokens.sampler_logprobs).exp(), 0.0)
    low, high = IMPORTANCE_BOUNDS
    found: Metrics = {
        "importance_ratio": (ratio, drawn),
        "importance_out_of_bounds": (((ratio < low) | (ratio > high)).to(ratio.dtype), drawn),
    }
    if scores.student_entropy is not None:
        found["student_entropy"] = (scores.student_entropy, everywhere)
    if scores.teacher is not None:
        known = tokens.teacher_valid & torch.isfinite(scores.teacher)
        found["sampled_kl"] = (torch.where(known, scores.student - scores.teacher, 0.0), known)
        found["teacher_logprob"] = (scores.teacher, known)
    if kl is not None and scores.teacher_entropy is not None:
        found["kl"] = (kl, tokens.teacher_valid)
        found["teacher_entropy"] = (scores.teacher_entropy, tokens.teacher_valid)
    return found


def by_position(teacher_logprob: Tensor, offset: Tensor) -> Metrics:
    """`teacher_logprob` [tokens] (NaN where it is not known) by the response offset of the token."""
    known, starts = ~teacher_logprob.isnan(), torch.tensor(POSITIONS, device=offset.device)
    bucket = torch.bucketize(offset, starts, right=True) - 1
    return {
        f"teacher_logprob_from_{start}": (teacher_logprob, known & (bucket == i)) for i, start in enumerate(POSITIONS)
    }
