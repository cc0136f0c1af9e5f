"""Every loss again, dense, in a few lines each, sharing no code with nemo_opd: what the matrix compares with.

A reference takes the logits of both models [tokens, vocab] and the written tokens, and returns the loss of every token.
Sums, masks and normalisers are applied by `reference_answer`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nemo_opd.config import SlotConfig
from nemo_opd.types import TokenBatch
from tests.helpers.losses import Answer, Case, make_data

Reference = Callable[[Tensor, Tensor, TokenBatch, SlotConfig], Tensor]


def _at(log_probs: Tensor, ids: Tensor) -> Tensor:
    return log_probs[torch.arange(len(ids)), ids]


def reverse_kl(z: Tensor, zt: Tensor, tokens: TokenBatch, slot: SlotConfig) -> Tensor:
    p = z.softmax(1)
    return (p * (p.log() - zt.softmax(1).log())).sum(1)


def policy_gradient(z: Tensor, zt: Tensor, tokens: TokenBatch, slot: SlotConfig) -> Tensor:
    log_p, log_q = _at(z.log_softmax(1), tokens.ids), _at(zt.log_softmax(1), tokens.ids)
    advantage = (log_q - log_p).detach()
    ratio = torch.exp(log_p - tokens.sampler_logprobs)
    if slot.clip_ratio is None:
        return -ratio * advantage
    clipped = torch.clip(ratio, 1 - slot.clip_ratio, 1 + slot.clip_ratio)
    return torch.maximum(-ratio * advantage, -clipped * advantage)


def cross_entropy(z: Tensor, zt: Tensor, tokens: TokenBatch, slot: SlotConfig) -> Tensor:
    return torch.nn.functional.cross_entropy(z, tokens.ids, reduction="none")


REFERENCES: dict[str, Reference] = {
    "reverse_kl": reverse_kl,
    "policy_gradient": policy_gradient,
    "cross_entropy": cross_entropy,
}
NO_TEACHER = {"cross_entropy"}


def reference_answer(case: Case) -> Answer:
    """Loss and gradients of the whole batch by plain autograd."""
    data = make_data(case.batch)
    hidden, weight = data.hidden.clone().requires_grad_(), data.weight.clone().requires_grad_()
    losses = REFERENCES[case.loss.name](hidden @ weight.T, data.teacher_logits, data.tokens, case.loss)
    counts = torch.ones_like(data.tokens.teacher_valid) if case.loss.name in NO_TEACHER else data.tokens.teacher_valid
    total = losses[counts].sum() / max(1, int(counts.sum())) + 0 * hidden.sum() + 0 * weight.sum()
    dhidden, dweight = torch.autograd.grad(total, (hidden, weight))
    return Answer(float(total.detach()), dhidden, dweight, {})
