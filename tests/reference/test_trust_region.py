"""TrOPD by exact sums over a small vocabulary: what its trust term is in expectation, and what is drawn for it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from nemo_opd.config import ReverseKLLoss, SlotConfig, TrustRegionLoss
from nemo_opd.losses import build_loss
from nemo_opd.vocab.logits import LogitsView
from nemo_opd.vocab.objective import SampledScores
from tests.reference.test_identities import VOCAB, expected_gradient, one_token_each, two_models

TINY = 6


def through_coefficients(z: torch.Tensor, coefficient: torch.Tensor) -> torch.Tensor:
    """Logit gradient of -E_{y ~ p}[c_y log p_y] with the c_y held constant: -p_u (c_u - sum_v p_v c_v)."""
    p = z.softmax(0)
    return -p * (coefficient - (p * coefficient).sum())


@pytest.mark.parametrize("seed", range(3))
def test_the_trust_term_has_the_coefficient_min_r_1_log_r_at_least_minus_one_over_e(seed):
    z, zt = two_models(seed)
    log_r = zt.log_softmax(0) - z.log_softmax(0)
    coefficient = log_r.exp().clamp(max=1) * log_r
    got = expected_gradient(build_loss(TrustRegionLoss(trust="expected", outlier="mask")), z, zt)
    torch.testing.assert_close(got, through_coefficients(z, coefficient), rtol=0, atol=1e-14)
    assert coefficient.min() >= -1 / math.e - 1e-12


def test_an_outlier_that_would_dominate_the_policy_gradient_does_not():
    z = torch.tensor([12.0, 0.0, 0.0], dtype=torch.float64)
    zt = torch.tensor([-20.0, 0.0, 0.0], dtype=torch.float64)
    log_r = zt.log_softmax(0) - z.log_softmax(0)
    assert log_r.min() < -20
    trusted = expected_gradient(build_loss(TrustRegionLoss(trust="expected", outlier="mask")), z, zt)
    clipped = expected_gradient(build_loss(TrustRegionLoss(trust="expected", outlier="clip")), z, zt)
    assert trusted.abs().max() < clipped.abs().max() < 1.0


def test_the_outlier_term_is_the_forward_kl_on_the_teachers_best_ids_where_rejected():
    z, zt = two_models(1)
    loss = TrustRegionLoss(trust="expected", k=4)
    rejected = 1 - (zt.log_softmax(0) - z.log_softmax(0)).exp().clamp(max=1)
    share = float((z.softmax(0) * rejected).sum())
    assert 0.1 < share < 0.9
    q = torch.zeros(VOCAB, dtype=torch.float64)
    best = zt.topk(4).indices
    q[best] = zt.softmax(0)[best]
    forward = q.sum() * z.softmax(0) - q  # of -sum_S q log p
    both, without = (expected_gradient(build_loss(slot), z, zt) for slot in (loss, replace(loss, outlier="mask")))
    torch.testing.assert_close(both - without, share * forward, rtol=0, atol=1e-14)


def test_sampled_and_expected_agree_in_mean():
    z, zt = two_models(2, vocab=TINY)
    draws = 4000
    tokens = one_token_each(TINY, z.log_softmax(0))
    tokens = tokens.select(torch.arange(TINY).repeat(draws))
    tokens = replace(tokens, response_key=torch.arange(len(tokens)) * 7919, sequence=torch.arange(len(tokens)))
    scores = SampledScores(z.log_softmax(0)[tokens.ids], zt.log_softmax(0)[tokens.ids])

    def gradients(trust: str) -> torch.Tensor:
        """Of each draw, weighted by p: [draws, TINY]"""
        loss = build_loss(TrustRegionLoss(trust=trust, k=3))
        logits = z.expand(len(tokens), TINY).clone().requires_grad_()
        teacher = LogitsView(zt.expand(len(tokens), TINY).contiguous())
        values = loss.evaluate(LogitsView(logits), teacher, tokens, loss.prepare(scores, tokens)).losses.values()
        (grad,) = torch.autograd.grad((z.softmax(0)[tokens.ids] * sum(values)).sum(), logits)
        return grad.view(draws, TINY, TINY).sum(1)

    sampled, expected = gradients("sampled"), gradients("expected")
    assert torch.allclose(expected, expected[:1].expand_as(expected), rtol=0, atol=1e-15)
    deviation = sampled.std(0) / math.sqrt(draws)
    assert deviation.max() > 1e-4, "draws differ"
    assert ((sampled.mean(0) - expected[0]).abs() < 4 * deviation).all()


def test_where_both_agree_nothing_is_rejected():
    z, _ = two_models()
    tokens = one_token_each(VOCAB, z.log_softmax(0))
    loss = build_loss(TrustRegionLoss(k=4))
    view = LogitsView(z.expand(VOCAB, VOCAB).contiguous())
    rejected, _ = loss.evaluate(view, view, tokens, None).metrics["rejected"]
    assert not rejected.any()


def test_a_draw_needs_the_tokens_address():
    z, zt = two_models()
    tokens = replace(one_token_each(VOCAB, z.log_softmax(0)), response_key=None)
    views = [LogitsView(m.expand(VOCAB, VOCAB).contiguous()) for m in (z, zt)]
    with pytest.raises(ValueError, match="response_key"):
        build_loss(TrustRegionLoss(k=4)).evaluate(*views, tokens, None)


def steps_until_unlearnt(slot: SlotConfig, limit: int) -> int:
    """Gradient steps (rate 1, expected gradients) after which a student that is sure of what the teacher finds absurd
    is so no more; `limit` when it still is."""
    z = torch.tensor([15.0, 0.0, 0.0, 0.0], dtype=torch.float64)  # .9999991 on the first id
    zt = torch.tensor([-20.0, 1.0, 0.0, -1.0], dtype=torch.float64)
    for step in range(limit):
        if z.softmax(0)[0] < 0.5:
            return step
        z = z - expected_gradient(build_loss(slot), z, zt)
    return limit


def test_rejected_tokens_are_unlearnt_where_reverse_kl_hardly_moves() -> None:
    """The gradient of reverse KL has the factor p(1 - p): a student that is sure of itself does not learn from it. Nor
    does the trust term alone; the forward KL of rejected tokens has no such factor."""
    assert steps_until_unlearnt(TrustRegionLoss(trust="expected", k=3), 100) < 40
    for slot in (ReverseKLLoss(), TrustRegionLoss(trust="expected", outlier="mask")):
        assert steps_until_unlearnt(slot, 300) == 300
