"""Top-k reverse KL made unbiased by the token that was sampled."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_opd.losses.registry import register_loss
from nemo_opd.losses.top_k import OnSupport, TopKLoss, masked_sum
from nemo_opd.types import TokenBatch


@register_loss("head_plus_sample")
class HeadPlusSampleTopK(TopKLoss):
    """``stop_gradient`` on S plus ``1[y not in S] sg[A_y] p_y / sg[mu_y]``, y the sampled token, mu the distribution it
    was really drawn from (arXiv 2605.11182): over y ~ mu its gradient is that of the full KL(p || q), as long as mu can
    draw every token off S. With top-p below 1 it cannot, and the loss stays biased.

    Needs `sampler_logprobs` (after temperature and filters); tokens without are not counted. Needs log q of the
    sampled token as well as of S, so a served teacher's one set of ids does not do.
    """

    def __init__(self, k: int = 20, support: str = "student") -> None:
        super().__init__(k, support, "full")

    def counted(self, tokens: TokenBatch) -> Tensor:
        return super().counted(tokens) & tokens.sampler_logprobs.isfinite()

    def on_support(self, both: OnSupport, tokens: TokenBatch) -> Tensor:
        assert both.p_written is not None and both.q_written is not None
        head = masked_sum(both.log_p.exp() * (both.log_p.detach() - both.log_q), both.inside)
        outside = ~(both.inside & (both.support.ids == tokens.ids.unsqueeze(1))).any(1)
        drawn = tokens.sampler_logprobs.isfinite()
        log_mu = torch.where(drawn, tokens.sampler_logprobs, 0.0).to(both.log_p.dtype)
        gap = (both.p_written - both.q_written).detach()
        sample = gap * torch.exp(both.p_written - log_mu)
        return head + torch.where(outside & drawn, sample, 0.0)
