"""Top-k with both distributions renormalised on the support."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_opd.losses.registry import register_loss
from nemo_opd.losses.top_k import NormalisedTopKLoss, OnSupport
from nemo_opd.types import TokenBatch


@register_loss("renormalised")
class RenormalisedTopK(NormalisedTopKLoss):
    """The divergence of p / P and q / Q on S: the conditional divergence, which moves no mass between S and the rest
    (arXiv 2605.11182). 0 where an intersection is empty."""

    def on_support(self, both: OnSupport, tokens: TokenBatch) -> Tensor:
        some = both.inside.any(1, keepdim=True)

        def conditional(log_probs: Tensor) -> Tensor:
            # An empty support keeps its zeros, so that no gradient passes through the logarithm of nothing.
            kept = torch.where(both.inside | ~some, log_probs, -torch.inf)
            return torch.where(both.inside, log_probs - kept.logsumexp(1, keepdim=True), 0.0)

        return self.divergence_between(conditional(both.log_p), conditional(both.log_q), both.inside)
