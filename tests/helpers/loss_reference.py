"""Every loss again, dense, in a few lines each, sharing no code with nemo_opd: what the matrix compares with.

A reference takes the logits of both models [tokens, vocab], the written tokens and the slot's parameters, and returns
the loss of every token. Masks, weights and normalisers are applied by `reference_answer`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nemo_opd.config import GroupRelativeReward, SlotConfig
from nemo_opd.types import Author, TokenBatch
from tests.helpers.losses import Answer, Case, Data, make_data

Reference = Callable[[Tensor, Tensor, TokenBatch, SlotConfig], Tensor]


def _at(log_probs: Tensor, ids: Tensor) -> Tensor:
    return log_probs[torch.arange(len(ids)), ids]


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return torch.where(p > 0, p * (p.clamp_min(1e-300).log() - q.clamp_min(1e-300).log()), 0.0).sum(-1)


def _divergence(p: Tensor, q: Tensor, kind: str, beta: float = 0.5) -> Tensor:
    if kind == "reverse" or (kind == "jsd" and beta == 1):
        return _kl(p, q)
    if kind == "forward" or beta == 0:
        return _kl(q, p)
    m = beta * q + (1 - beta) * p
    return beta * _kl(q, m) + (1 - beta) * _kl(p, m)


def reverse_kl(z: Tensor, zt: Tensor, tokens: TokenBatch, slot: SlotConfig) -> Tensor:
    return _divergence(z.softmax(1), zt.softmax(1), "reverse")


def forward_kl(z: Tensor, zt: Tensor, tokens: TokenBatch, slot: SlotConfig) -> Tensor:
    return _divergence(z.softmax(1), zt.softmax(1), "forward")


def jsd(z: Tensor, zt: Tensor, tokens: TokenBatch, slot: SlotConfig) -> Tensor:
    return _divergence(z.softmax(1), zt.softmax(1), "jsd", slot.beta)


def skew_forward_kl(z: Tensor, zt: Tensor, tokens: TokenBatch, slot: SlotConfig) -> Tensor:
    p, q = z.softmax(1), zt.softmax(1)
    return _kl(q, slot.alpha * q + (1 - slot.alpha) * p)


def skew_reverse_kl(z: Tensor, zt: Tensor, tokens: TokenBatch, slot: SlotConfig) -> Tensor:
    p, q = z.softmax(1), zt.softmax(1)
    return _kl(p, (1 - slot.alpha) * q + slot.alpha * p.detach())


def support_of(z: Tensor, zt: Tensor, slot: SlotConfig) -> Tensor:
    """bool [tokens, vocab]: which ids are in the support."""

    def top(logits: Tensor) -> Tensor:
        best = logits.topk(min(slot.k, logits.shape[1])).indices
        return torch.zeros_like(logits, dtype=torch.bool).scatter(1, best, True)

    student, teacher = top(z.detach()), top(zt)
    return {
        "student": student,
        "teacher": teacher,
        "union": student | teacher,
        "intersection": student & teacher,
    }[slot.support]


def _inside(terms: Tensor, support: Tensor) -> Tensor:
    return terms.masked_fill(~support, 0.0).sum(1)


def stop_gradient(z: Tensor, zt: Tensor, tokens: TokenBatch, slot: SlotConfig) -> Tensor:
    log_p, log_q = z.log_softmax(1), zt.log_softmax(1)
    return _inside(log_p.exp() * (log_p.detach() - log_q), support_of(z, zt, slot))


def tail(z: Tensor, zt: Tensor, tokens: TokenBatch, slot: SlotConfig) -> Tensor:
    support, p, q = support_of(z, zt, slot), z.softmax(1), zt.softmax(1)

    def bucketed(d: Tensor) -> Tensor:
        return torch.cat([d.masked_fill(~support, 0.0), _inside(d, ~support).unsqueeze(1)], 1)

    return _divergence(bucketed(p), bucketed(q), slot.divergence, slot.beta)


def renormalised(z: Tensor, zt: Tensor, tokens: TokenBatch, slot: SlotConfig) -> Tensor:
    support, p, q = support_of(z, zt, slot), z.softmax(1), zt.softmax(1)
    empty = ~support.any(1, keepdim=True)

    def conditional(d: Tensor) -> Tensor:
        kept = d.masked_fill(~support, 0.0)
        return kept / torch.where(empty, 1.0, kept.sum(1, keepdim=True))

    return _divergence(conditional(p), conditional(q), slot.divergence, slot.beta)


def head_plus_sample(z: Tensor, zt: Tensor, tokens: TokenBatch, slot: SlotConfig) -> Tensor:
    log_p, log_q = z.log_softmax(1), zt.log_softmax(1)
    y_p, y_q = _at(log_p, tokens.ids), _at(log_q, tokens.ids)
    outside = ~_at(support_of(z, zt, slot), tokens.ids)
    sample = (y_p - y_q).detach() * y_p.exp() / tokens.sampler_logprobs.exp()
    return stop_gradient(z, zt, tokens, slot) + torch.where(outside, sample, 0.0)


def naive(z: Tensor, zt: Tensor, tokens: TokenBatch, slot: SlotConfig) -> Tensor:
    log_p, log_q = z.log_softmax(1), zt.log_softmax(1)
    return _inside(log_p.exp() * (log_p - log_q), support_of(z, zt, slot))


def k2(z: Tensor, zt: Tensor, tokens: TokenBatch, slot: SlotConfig) -> Tensor:
    return (_at(z.log_softmax(1), tokens.ids) - _at(zt.log_softmax(1), tokens.ids)) ** 2 / 2


def _return(own: Tensor, tokens: TokenBatch, slot: SlotConfig, first: int = 0) -> Tensor:
    """Discounted sum, or mean, of `own` over the tokens of the response from offset + `first` on."""
    result = torch.zeros_like(own)
    for t in range(len(own)):
        later = [
            s for s in range(len(own)) if tokens.sequence[s] == tokens.sequence[t]
            and tokens.offset[s] >= tokens.offset[t] + first and tokens.teacher_valid[s]
        ]  # fmt: skip
        gaps = torch.tensor([int(tokens.offset[s] - tokens.offset[t]) for s in later], dtype=own.dtype)
        powers = slot.discount**gaps
        result[t] = (powers * own[later]).sum() / (powers.sum() if slot.length_normalised and later else 1.0)
    return result


def policy_gradient(z: Tensor, zt: Tensor, tokens: TokenBatch, slot: SlotConfig) -> Tensor:
    log_p, log_q = _at(z.log_softmax(1), tokens.ids), _at(zt.log_softmax(1), tokens.ids)
    own = (log_q - log_p).detach()
    if slot.advantage_clip is not None:
        own = own.clip(-slot.advantage_clip, slot.advantage_clip)
    if slot.advantage_floor is not None:
        own = own.clip(min=math.log(slot.advantage_floor / (1 - slot.advantage_floor)))
    advantage = _return(own, tokens, slot) if slot.discount > 0 else own
    ratio = _ratio(log_p, tokens, slot)
    if slot.clip_ratio is None:
        return -ratio * advantage
    clipped = torch.clip(ratio, 1 - slot.clip_ratio, 1 + slot.clip_ratio)
    return torch.maximum(-ratio * advantage, -clipped * advantage)


def extrapolated(z: Tensor, zt: Tensor, tokens: TokenBatch, slot: SlotConfig) -> Tensor:
    y_p, y_q = (_at(m.log_softmax(1), tokens.ids) for m in (z, zt))
    y_b = _at((0.5 * zt + 0.3 * z.detach()).log_softmax(1), tokens.ids)
    entropy = -(zt.softmax(1) * zt.log_softmax(1)).sum(1)
    factor = torch.full_like(y_p, slot.extrapolation)
    if slot.low_entropy is not None:
        factor[entropy < slot.low_entropy] = min(1.0, slot.extrapolation)
    advantage = (factor * (y_q - y_b) - (y_p - y_b)).detach()
    return -_ratio(y_p, tokens, slot) * advantage


def cross_entropy(z: Tensor, zt: Tensor, tokens: TokenBatch, slot: SlotConfig) -> Tensor:
    return torch.nn.functional.cross_entropy(z, tokens.ids, reduction="none")


def _uniform(key: int, offset: int) -> float:
    """SplitMix64 in Python's integers: finalised key, then the stream's output at `offset`, then one of its own."""

    def finalise(x: int) -> int:
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            x = (x ^ x >> shift) * factor % 2**64
        return x

    bits = finalise(finalise(key) + (offset + 1) * 0x9E3779B97F4A7C15 & 2**64 - 1)
    return ((bits >> 12) + 0.5) / 2**52


def _ratio(log_p: Tensor, tokens: TokenBatch, slot: SlotConfig) -> Tensor:
    old = tokens.sampler_logprobs if slot.importance_ratio == "sampler" else log_p.detach()
    return torch.exp(log_p - torch.where(old.isnan(), log_p.detach(), old))


def trust_region(z: Tensor, zt: Tensor, tokens: TokenBatch, slot: SlotConfig) -> Tensor:
    log_p, log_q = z.log_softmax(1), zt.log_softmax(1)
    y_p, y_q = _at(log_p, tokens.ids), _at(log_q, tokens.ids)
    gap = (y_q - y_p).detach()
    trusted = gap.exp().clip(max=1)
    if slot.trust == "sampled":
        drawn = [_uniform(k, t) for k, t in zip(tokens.response_key.tolist(), tokens.offset.tolist(), strict=True)]
        trusted = (torch.tensor(drawn, dtype=z.dtype) < trusted).to(z.dtype)
    ratio = _ratio(y_p, tokens, slot)
    if slot.outlier == "mask":
        return -trusted * ratio * gap
    if slot.outlier == "clip":
        return -ratio * (trusted * gap + (1 - trusted) * gap.clip(min=-slot.outlier_clip))
    best = zt.topk(min(slot.k, zt.shape[1])).indices
    inside = torch.zeros_like(zt, dtype=torch.bool).scatter(1, best, True)
    forward = _inside(log_q.exp() * (log_q - log_p), inside)
    if slot.tail and not inside.all():
        p_rest, q_rest = (_inside(d.exp(), ~inside) for d in (log_p, log_q))
        forward = forward + q_rest * (q_rest / p_rest).log()
    return -trusted * ratio * gap + (1 - trusted) * ratio.detach() * forward


def entropy_aware(z: Tensor, zt: Tensor, tokens: TokenBatch, slot: SlotConfig) -> Tensor:
    p, q = z.softmax(1), zt.softmax(1)
    y_p, y_q = _at(p.log(), tokens.ids), _at(q.log(), tokens.ids)
    inside = torch.zeros_like(zt, dtype=torch.bool).scatter(1, zt.topk(min(slot.k, zt.shape[1])).indices, True)
    p_in, q_in = (d.masked_fill(~inside, 0.0) for d in (p, q))
    if slot.outside == "renormalised":
        forward = _kl(q_in / q_in.sum(1, keepdim=True), p_in / p_in.sum(1, keepdim=True))
    else:
        rest = [_inside(d, ~inside).unsqueeze(1) for d in (p, q)]
        forward = _kl(torch.cat([q_in, rest[1]], 1), torch.cat([p_in, rest[0]], 1))
    hesitates = -(q * q.log()).sum(1) > slot.entropy_threshold
    return -_ratio(y_p, tokens, slot) * (y_q - y_p).detach() + hesitates * forward


def minillm(z: Tensor, zt: Tensor, tokens: TokenBatch, slot: SlotConfig) -> Tensor:
    log_p, log_q = z.log_softmax(1), zt.log_softmax(1)
    y_p = _at(log_p, tokens.ids)
    later = _return((_at(log_q, tokens.ids) - y_p).detach(), tokens, slot, first=1)
    ratio = torch.exp(y_p - tokens.sampler_logprobs)
    low, high = (1 - slot.clip_ratio, 1 + slot.clip_ratio) if slot.clip_ratio else (0.0, math.inf)
    gain = torch.minimum(ratio * later, ratio.clip(low, high) * later)
    return ratio.detach() * _kl(z.softmax(1), zt.softmax(1)) - gain


def verifier_policy_gradient(z: Tensor, zt: Tensor, tokens: TokenBatch, slot: SlotConfig) -> Tensor:
    """`slot` is the reward's; without one nothing is clipped."""
    ratio = torch.exp(_at(z.log_softmax(1), tokens.ids) - tokens.sampler_logprobs)
    low, high = (getattr(slot, name, None) for name in ("clip_low", "clip_high"))
    clipped = torch.clip(ratio, 0.0 if low is None else 1 - low, None if high is None else 1 + high)
    advantage = tokens.advantage.nan_to_num(0.0)
    return torch.where(advantage > 0, torch.minimum(ratio, clipped), torch.maximum(ratio, clipped)) * -advantage


REFERENCES: dict[str, Reference] = {
    f.__name__: f
    for f in (
        reverse_kl, forward_kl, jsd, skew_forward_kl, skew_reverse_kl, stop_gradient, tail, renormalised,
        head_plus_sample, naive, k2, policy_gradient, cross_entropy, trust_region, entropy_aware,
        minillm, extrapolated, verifier_policy_gradient,
    )
}  # fmt: skip
NO_TEACHER = {"cross_entropy"}


def weight_of(case: Case, data: Data) -> Tensor:
    """Factor of every token."""
    slot, tokens = case.weight, data.tokens
    log_p, log_q = (_at(z.log_softmax(1), tokens.ids) for z in (data.logits, data.teacher_logits))
    ratio = torch.exp(log_p - tokens.sampler_logprobs)
    if slot.name == "tis":
        return ratio.clip(max=slot.clamp)
    if slot.name == "icepop":
        return ratio * ((ratio >= slot.low) & (ratio <= slot.high))
    factor = torch.ones_like(ratio)
    if slot.name == "entropy":
        d = (data.logits if slot.of == "student" else data.teacher_logits).softmax(1)
        entropy = -(d * d.log()).sum(1)
        for sequence in tokens.sequence.unique():
            mine = ((tokens.sequence == sequence) & tokens.teacher_valid).nonzero().squeeze(1)
            m = max(1, math.ceil(slot.keep * len(mine) - 1e-6))
            factor[tokens.sequence == sequence] = 0.0
            factor[sorted(mine.tolist(), key=lambda t: -float(entropy[t]))[:m]] = len(mine) / m
        return factor
    for t in range(len(ratio)):
        same = tokens.sequence == tokens.sequence[t]
        if slot.name == "sequence":
            mean = float(ratio[same].log().mean().exp())
            factor[t] = float(slot.low <= mean <= slot.high)
        if slot.name == "prefix":
            gap = torch.where(tokens.teacher_valid, (log_q - log_p).abs(), 0.0)
            before = gap[same & (tokens.offset < tokens.offset[t])].sum()
            factor[t] = 1 + slot.gamma * (1 - before / gap[same].sum()) if gap[same].sum() > 0 else 1 + slot.gamma
    return factor


def _shares(case: Case, tokens: TokenBatch) -> list[tuple[Tensor, str, float, bool]]:
    """(tokens, loss, factor, does the weight apply?) for the student's tokens and those of others."""
    slot, everyone = case.prefix, torch.ones_like(tokens.teacher_valid)
    if slot.name not in ("teacher", "mixed"):
        return [(everyone, case.loss.name, 1.0, True)]
    others = tokens.author != int(Author.STUDENT)
    kind = case.loss.name if slot.loss == "same" else "cross_entropy"
    own, theirs = 1.0, slot.loss_weight
    if theirs is None:
        own, theirs = slot.on_policy_share, 1 - slot.on_policy_share
    return [(~others, case.loss.name, own, True), (others, kind, theirs, False)]


def reference_answer(case: Case) -> Answer:
    """Loss and gradients of the whole batch by plain autograd."""
    data = make_data(case.batch)
    hidden, weight = data.hidden.clone().requires_grad_(), data.weight.clone().requires_grad_()
    reward, rewarded = case.reward, data.tokens.advantage.isfinite() & data.tokens.sampler_logprobs.isfinite()
    alone, beside = case.loss.name == "verifier_policy_gradient", isinstance(reward, GroupRelativeReward)
    total = 0 * hidden.sum() + 0 * weight.sum()
    for mine, name, factor, weighted in () if alone else _shares(case, data.tokens):
        losses = REFERENCES[name](hidden @ weight.T, data.teacher_logits, data.tokens, case.loss)
        counts = mine if name in NO_TEACHER else mine & data.tokens.teacher_valid
        factors = weight_of(case, data) if weighted else torch.ones_like(losses)
        factor = factor * reward.loss_weight if beside else factor
        total = total + factor * (factors * losses)[counts].sum() / max(1, int(counts.sum()))
    if alone or beside:
        losses = verifier_policy_gradient(hidden @ weight.T, data.teacher_logits, data.tokens, reward)
        factor = reward.weight if beside else 1.0
        total = total + factor * losses[rewarded].sum() / max(1, int(rewarded.sum()))
    dhidden, dweight = torch.autograd.grad(total, (hidden, weight))
    return Answer(float(total.detach()), dhidden, dweight, {})
