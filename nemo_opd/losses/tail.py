"""Top-k with one more bucket for everything else."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_opd.losses.registry import register_loss
from nemo_opd.losses.top_k import NormalisedTopKLoss, OnSupport
from nemo_opd.types import TokenBatch


@register_loss("tail")
class TailTopK(NormalisedTopKLoss):
    """The exact divergence of the (k+1)-way distributions on S and "everything else"; for reverse KL
    ``sum_S p_v A_v + p_tail log(p_tail / q_tail)`` (arXiv 2605.11182). A lower bound of the full divergence.

    Where logits are at hand the tails are logsumexps with S left out. Of a served teacher log(1 - Q) is all there is,
    with Q held below 1 by `nemo_opd.vocab.partial.LARGEST_MASS`.
    """

    tail = True

    def on_support(self, both: OnSupport, tokens: TokenBatch) -> Tensor:
        assert both.p_tail is not None and both.q_tail is not None
        # Nothing is outside a support that holds the whole vocabulary.
        rest = (both.p_tail.isfinite() & both.q_tail.isfinite()).unsqueeze(1)
        p_tail = torch.where(rest, both.p_tail.unsqueeze(1), 0.0)
        q_tail = torch.where(rest, both.q_tail.unsqueeze(1), 0.0)
        return self.divergence_between(
            torch.cat([both.log_p, p_tail], 1), torch.cat([both.log_q, q_tail], 1), torch.cat([both.inside, rest], 1)
        )
