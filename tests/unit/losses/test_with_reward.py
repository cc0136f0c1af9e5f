"""The verifier's policy gradient, alone and beside a loss that learns from a teacher; float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nemo_opd.config import (
    ForwardKLLoss,
    GroupRelativeReward,
    JSDLoss,
    K2Loss,
    NoReward,
    PolicyGradientLoss,
    ReverseKLLoss,
    SlotConfig,
    TailLoss,
    VerifierPolicyGradientLoss,
)
from nemo_opd.losses import DistillationLoss, build_loss, with_reward
from nemo_opd.losses.verifier_policy_gradient import VerifierPolicyGradient
from nemo_opd.types import TokenBatch
from nemo_opd.vocab.fused import OutputLayer, fused_loss
from nemo_opd.vocab.logits import LogitsView
from nemo_opd.vocab.shard import dense_shard
from tests.helpers.losses import Batch, Data, make_data, with_payload

BATCH = Batch(vocab=23, k=5)
REWARD = GroupRelativeReward(weight=0.7, loss_weight=0.3)


def _gradients(
    loss: DistillationLoss, data: Data, tokens: TokenBatch, hand_written: bool = True
) -> tuple[float, Tensor, Tensor]:
    """(loss, gradient of the hidden states, of the output layer), every component over its own count."""
    shard = dense_shard(BATCH.vocab)
    hidden, weight = data.hidden.clone().requires_grad_(), data.weight.clone().requires_grad_()
    normalisers = {name: max(1.0, float(mask.sum())) for name, mask in loss.component_masks(tokens).items()}
    teacher = OutputLayer(data.teacher_weight, shard)
    options = {"chunk_tokens": 4, "hand_written": hand_written}
    out = fused_loss(loss, hidden, OutputLayer(weight, shard), teacher, tokens, normalisers, **options)
    return float(out.loss.detach()), *torch.autograd.grad(out.loss, (hidden, weight))


@pytest.mark.parametrize("hand_written", [True, False])
@pytest.mark.parametrize(
    "slot",
    [ReverseKLLoss(), ForwardKLLoss(), JSDLoss(beta=0.3), TailLoss(k=5), K2Loss(), PolicyGradientLoss(discount=0.9)],
    ids=lambda slot: slot.name,
)
def test_the_gradient_is_the_weighted_sum_of_both(slot: SlotConfig, hand_written: bool) -> None:
    data, main = make_data(BATCH), build_loss(slot)
    tokens = with_payload(data, main.needs.need, main.needs.k)
    both = _gradients(with_reward(build_loss(slot), REWARD), data, tokens, hand_written)
    first = _gradients(main, data, tokens)
    second = _gradients(VerifierPolicyGradient(0.2, 0.2), data, data.tokens)
    for sum_of_both, one, other in zip(both, first, second, strict=True):
        torch.testing.assert_close(
            torch.as_tensor(sum_of_both), torch.as_tensor(0.3 * one + 0.7 * other), rtol=0, atol=1e-13
        )


def test_a_group_without_advantage_contributes_exactly_nothing() -> None:
    """Neither to the sum nor to the count: the same as if its responses were not there."""
    data, loss = make_data(BATCH), VerifierPolicyGradient(0.2, 0.2)
    tokens = replace(data.tokens, advantage=torch.where(data.tokens.sequence == 1, torch.nan, 0.5))
    kept = (tokens.sequence != 1).nonzero().squeeze(1)
    value, dhidden, dweight = _gradients(loss, data, tokens)
    without = replace(data, hidden=data.hidden[kept], tokens=tokens.select(kept))
    expected = _gradients(loss, without, without.tokens)
    assert value == pytest.approx(expected[0], abs=1e-14)
    assert not dhidden[tokens.sequence == 1].any()
    torch.testing.assert_close(dhidden[kept], expected[1], rtol=0, atol=1e-15)
    torch.testing.assert_close(dweight, expected[2], rtol=0, atol=1e-15)
    zero = replace(tokens, advantage=torch.zeros_like(tokens.advantage))
    assert _gradients(loss, data, zero)[0] == 0.0 and not any(g.any() for g in _gradients(loss, data, zero)[1:])


def test_on_policy_its_expected_gradient_is_that_of_the_expected_reward() -> None:
    """sum over y of p_y A_y, differentiated; clipping does nothing where the ratio is 1."""
    vocab, generator = 11, torch.Generator().manual_seed(0)
    z = torch.randn(vocab, generator=generator, dtype=torch.float64)
    reward = torch.randn(vocab, generator=generator, dtype=torch.float64)
    ids = torch.arange(vocab)
    tokens = replace(
        make_data(Batch(lengths=(vocab,), vocab=vocab, lost="none")).tokens,
        ids=ids, sampler_logprobs=z.log_softmax(0), advantage=reward,
    )  # fmt: skip
    logits = z.expand(vocab, vocab).clone().requires_grad_()
    (value,) = VerifierPolicyGradient(0.2, 0.2).evaluate(LogitsView(logits), None, tokens, None).losses.values()
    (per_row,) = torch.autograd.grad(value @ z.softmax(0), logits)
    leaf = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(-(leaf.softmax(0) @ reward), leaf)
    torch.testing.assert_close(per_row.sum(0), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "moves"),
    [
        (1.5, 1.0, -1.4, False),  # good, already raised beyond the upper bound
        (1.3, 1.0, -1.3, True),
        (0.5, 1.0, -0.5, True),  # good and fallen: pulled back whatever the bounds
        (0.5, -1.0, 0.8, False),  # bad, already lowered beyond the lower bound
        (0.9, -1.0, 0.9, True),
        (1.5, -1.0, 1.5, True),
    ],
)
def test_each_bound_stops_one_direction(ratio: float, advantage: float, value: float, moves: bool) -> None:
    tokens = replace(
        make_data(Batch(lengths=(1,), vocab=5, lost="none")).tokens,
        sampler_logprobs=torch.tensor([-math.log(ratio)], dtype=torch.float64),
        advantage=torch.tensor([advantage], dtype=torch.float64),
    )
    logprob = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    loss = VerifierPolicyGradient(clip_low=0.2, clip_high=0.4)
    (got,) = loss.sampled_losses(logprob, tokens, None).values()
    assert float(got) == pytest.approx(value)
    assert bool(torch.autograd.grad(got.sum(), logprob)[0].any()) == moves


def test_what_is_built_from_the_two_slots() -> None:
    plain = with_reward(build_loss(ReverseKLLoss()), NoReward())
    assert plain.components == ("reverse_kl",) and plain.zero_at_match
    alone = with_reward(build_loss(VerifierPolicyGradientLoss()), GroupRelativeReward(weight=2.0))
    assert alone.components == ("verifier_policy_gradient",) and alone.coefficients == {alone.name: 2.0}
    both = with_reward(build_loss(ReverseKLLoss()), REWARD)
    assert both.components == ("reverse_kl", "verifier_policy_gradient") and not both.zero_at_match
    assert both.needs == plain.needs
