"""The importance ratio of trainer to sampler, for losses that carry it themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_opd.errors import ConfigError
from nemo_opd.types import TokenBatch


def importance_ratio(logprobs: Tensor, tokens: TokenBatch, kind: str) -> Tensor:
    """p(y) / sg[mu(y)] [tokens], differentiable in `logprobs` = log p(y); mu is what the token was drawn from.

    With `kind` "none" mu is p itself: the value is 1 and the gradient grad log p(y). The same for a token that the
    sampler did not draw; whoever needs a ratio there must not count it.
    """
    sampler = logprobs.detach()
    if kind == "sampler":
        sampler = torch.where(tokens.sampler_logprobs.isfinite(), tokens.sampler_logprobs, sampler)
    return (logprobs - sampler).exp()


def check_importance_ratio(kind: str) -> None:
    """Raises ConfigError for a kind that does not exist."""
    if kind not in ("sampler", "none"):
        raise ConfigError("loss.importance_ratio", kind, "sampler or none", "none goes with a correction in `weight`")
