"""The biased top-k loss, as a reference for experiments. No recipe can name it."""

from __future__ import annotations

from torch import Tensor

from nemo_opd.losses.top_k import OnSupport, TopKLoss, masked_sum
from nemo_opd.types import TokenBatch


class NaiveTopK(TopKLoss):
    """sum_S p_v (log p_v - log q_v), differentiated as it stands: gradient sum_S grad p_v (A_v + 1).

    A token's own term pushes it up only where q_v > e p_v, so probability leaves S even where student and teacher
    agree; training with it drifts into repetition (arXiv 2605.11182). It has no registered name: `build_loss` refuses
    ``naive`` with the alternatives.
    """

    name = "naive"
    zero_at_match = False

    def on_support(self, both: OnSupport, tokens: TokenBatch) -> Tensor:
        return masked_sum(both.log_p.exp() * (both.log_p - both.log_q), both.inside)
