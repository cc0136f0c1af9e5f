"""Top-k reverse KL with the student's log-probability held constant."""

from __future__ import annotations

from torch import Tensor

from nemo_opd.losses.registry import register_loss
from nemo_opd.losses.top_k import OnSupport, TopKLoss, masked_sum
from nemo_opd.types import TokenBatch


@register_loss("stop_gradient")
class StopGradientTopK(TopKLoss):
    """sum_S p_v (sg[log p_v] - log q_v): gradient sum_S grad p_v A_v (arXiv 2605.11182).

    Defined for reverse KL only. The value is the truncated sum and may be negative.
    """

    def on_support(self, both: OnSupport, tokens: TokenBatch) -> Tensor:
        return masked_sum(both.log_p.exp() * (both.log_p.detach() - both.log_q), both.inside)
