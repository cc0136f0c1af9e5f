"""From logits to one token per sequence and its log-probability.

Order of the filters: temperature, then top-k, then top-p, each acting on what the one before left. transformers
(`generation/utils.py`) and vLLM (`v1/sample`) both use this order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_opd.types import Sampling
from nemo_opd.vocab.noise import gumbel

_ELEMENTS_AT_ONCE = 1 << 22
"""Rows are drawn in chunks of at most this many logits: float64 and int64 temporaries stay near 32 MiB each."""


def check_sampling(sampling: Sampling) -> None:
    """Raises ValueError for a value out of range."""
    rules = (
        ("max_new_tokens", sampling.max_new_tokens >= 1, "at least 1"),
        ("temperature", sampling.greedy or sampling.temperature > 0.0, "above 0 (greedy=True for the most probable)"),
        ("top_p", 0.0 < sampling.top_p <= 1.0, "in (0, 1], 1 switches it off"),
        ("top_k", sampling.top_k >= 0, "at least 0, 0 switches it off"),
    )
    for name, holds, expected in rules:
        if not holds:
            raise ValueError(f"sampling.{name}: got {getattr(sampling, name)}; expected {expected}")


def tells_its_own(sampling: Sampling) -> bool:
    """Is the log-probability that `draw` reports the model's own, at temperature 1 over the whole vocabulary?"""
    return sampling.greedy or (sampling.temperature == 1.0 and sampling.top_p == 1.0 and sampling.top_k == 0)


def _keep_top_k(logits: Tensor, k: int) -> Tensor:
    """-inf below the k-th largest logit of each row. Ties with the k-th stay, as in transformers and vLLM."""
    threshold = logits.topk(k, dim=-1).values[:, -1:]
    return logits.masked_fill(logits < threshold, float("-inf"))


def _keep_top_p(logits: Tensor, p: float) -> Tensor:
    """-inf outside the smallest set of most probable ids whose mass reaches p. The most probable id always stays."""
    ordered, ids = logits.sort(dim=-1, descending=True)
    probability = ordered.softmax(dim=-1)
    mass_before = probability.cumsum(dim=-1, dtype=torch.float64) - probability
    outside = mass_before >= p
    outside[:, 0] = False
    return logits.masked_fill(torch.zeros_like(outside).scatter_(-1, ids, outside), float("-inf"))


def process_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """The logits of the distribution that is sampled from: [rows, vocab], float32 (or float64), -inf where excluded."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if sampling.temperature != 1.0:
        logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = _keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1.0:
        logits = _keep_top_p(logits, sampling.top_p)
    return logits


def _draw_rows(logits: Tensor, sampling: Sampling, seeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    if sampling.greedy:
        processed = logits.to(torch.promote_types(logits.dtype, torch.float32))
        ids = processed.argmax(dim=-1)
    else:
        processed = process_logits(logits, sampling)
        ids = gumbel(seeds, positions, logits.shape[-1]).add_(processed).argmax(dim=-1)
    return ids, processed.log_softmax(dim=-1).gather(-1, ids[:, None]).squeeze(-1).float()


def draw(logits: Tensor, sampling: Sampling, seeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one id per row by the Gumbel-argmax trick: argmax_v (logit_v + noise_v) is distributed as the softmax.

    Args:
        logits: [rows, vocab], any float dtype.
        seeds, positions: int64 [rows], see `nemo_opd.vocab.noise`.

    Returns:
        ids, int64 [rows], and log-probabilities, float32 [rows], in nats. When sampling: of the processed distribution,
        the one that was really sampled from. When greedy: of the model's own distribution at temperature 1. (Greedy's
        own is 0 everywhere and tells nothing; it is meant for evaluation and never a sampler of training data.)
    """
    rows = max(1, _ELEMENTS_AT_ONCE // logits.shape[-1])
    if logits.shape[0] <= rows:
        return _draw_rows(logits, sampling, seeds, positions)
    parts = zip(logits.split(rows), seeds.split(rows), positions.split(rows), strict=True)
    drawn = [_draw_rows(part, sampling, seed, position) for part, seed, position in parts]
    return torch.cat([ids for ids, _ in drawn]), torch.cat([logprobs for _, logprobs in drawn])
