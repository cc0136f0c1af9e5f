"""Facts that an implementation must get right, by exact sums over a small vocabulary in float64."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from nemo_opd.config import (
    CrossEntropyLoss,
    EntropyAwareLoss,
    ExtrapolatedLoss,
    ForwardKLLoss,
    HeadPlusSampleLoss,
    JSDLoss,
    K2Loss,
    MiniLLMLoss,
    PolicyGradientLoss,
    RenormalisedLoss,
    ReverseKLLoss,
    SkewForwardKLLoss,
    SkewReverseKLLoss,
    SlotConfig,
    StopGradientLoss,
    TailLoss,
    TrustRegionLoss,
)
from nemo_opd.losses import DistillationLoss, build_loss
from nemo_opd.losses.naive import NaiveTopK
from nemo_opd.types import Need, TokenBatch
from nemo_opd.vocab.fused import OutputLayer, fused_loss
from nemo_opd.vocab.logits import LogitsView
from nemo_opd.vocab.objective import SampledScores
from nemo_opd.vocab.shard import dense_shard
from nemo_opd.vocab.statistics import blocked_logsumexp
from tests.helpers.losses import Batch, make_data, with_payload

VOCAB, K = 12, 4
LOSSES = [
    ReverseKLLoss(), ForwardKLLoss(), JSDLoss(beta=0.3), SkewForwardKLLoss(), SkewReverseKLLoss(),
    *[StopGradientLoss(k=K, support=s) for s in ("student", "teacher", "union", "intersection")],
    *[TailLoss(k=K, divergence=d, support=s) for d in ("reverse", "forward", "jsd") for s in ("student", "union")],
    *[RenormalisedLoss(k=K, divergence=d) for d in ("reverse", "forward", "jsd")],
    HeadPlusSampleLoss(k=K), K2Loss(), PolicyGradientLoss(), PolicyGradientLoss(clip_ratio=0.2),
    PolicyGradientLoss(advantage_clip=0.4, discount=0.9, length_normalised=True), CrossEntropyLoss(),
    TrustRegionLoss(k=K), TrustRegionLoss(k=K, trust="expected", tail=True), TrustRegionLoss(k=K, outlier="clip"),
    ExtrapolatedLoss(), ExtrapolatedLoss(extrapolation=1.0, low_entropy=2.0),
    EntropyAwareLoss(k=K, entropy_threshold=2.0), MiniLLMLoss(), EntropyAwareLoss(k=K, outside="renormalised"),
]  # fmt: skip


def two_models(seed: int = 0, vocab: int = VOCAB, scale: float = 1.5) -> tuple[Tensor, Tensor]:
    """Logits [vocab] of a student and a teacher."""
    rng = np.random.default_rng(seed)
    return tuple(torch.from_numpy(rng.normal(size=vocab) * scale) for _ in range(2))  # type: ignore[return-value]


def one_token_each(vocab: int, log_mu: Tensor) -> TokenBatch:
    """A batch in which every id is written once, each in a sequence of its own, drawn from mu."""
    ids = torch.arange(vocab)
    none = torch.zeros(vocab, dtype=torch.int64)
    return TokenBatch(
        position=ids, ids=ids, sequence=ids, offset=none, author=none.to(torch.int8), policy_version=none,
        sampler_logprobs=log_mu, advantage=torch.zeros(vocab), teacher_valid=torch.ones(vocab, dtype=torch.bool),
        response_key=ids,
    )  # fmt: skip


def expected_gradient(
    loss: DistillationLoss, z: Tensor, zt: Tensor, mu: Tensor | None = None, tokens: TokenBatch | None = None
) -> Tensor:
    """sum over y of mu_y times the logit gradient of the loss when y was written; mu is the student by default."""
    vocab = len(z)
    mu = z.softmax(0) if mu is None else mu
    tokens = tokens or one_token_each(vocab, mu.log())
    logits = z.expand(vocab, vocab).clone().requires_grad_()
    student, teacher = LogitsView(logits), LogitsView(zt.expand(vocab, vocab).contiguous())
    entropies = [view.detach().entropy() for view in (student, teacher)]
    prepared = loss.prepare(SampledScores(z.log_softmax(0), zt.log_softmax(0), *entropies), tokens)
    value = sum(loss.evaluate(student, teacher, tokens, prepared).losses.values())
    return torch.autograd.grad((mu * value).sum(), logits)[0].sum(0)


def exact_gradient(z: Tensor, zt: Tensor, forward: bool = False) -> Tensor:
    z = z.clone().requires_grad_()
    log_p, log_q = z.log_softmax(0), zt.log_softmax(0)
    value = (log_q.exp() * (log_q - log_p)).sum() if forward else (log_p.exp() * (log_p - log_q)).sum()
    return torch.autograd.grad(value, z)[0]


def expectation_through(estimator, z: Tensor, zt: Tensor) -> Tensor:
    """Expected gradient of back-propagating through an estimator of log p(y), log q(y)."""
    z = z.clone().requires_grad_()
    log_p, log_q = z.log_softmax(0), zt.log_softmax(0)
    return torch.autograd.grad((log_p.detach().exp() * estimator(log_p, log_q)).sum(), z)[0]


def test_k1_has_no_expected_gradient_k2_that_of_reverse_and_k3_that_of_forward_kl():
    z, zt = two_models()
    through_k1 = expectation_through(lambda p, q: p - q, z, zt)
    through_k3 = expectation_through(lambda p, q: (q - p).exp() - 1 + p - q, z, zt)
    assert through_k1.abs().max() < 1e-15
    torch.testing.assert_close(through_k3, exact_gradient(z, zt, forward=True), rtol=0, atol=1e-14)
    through_k2 = expected_gradient(build_loss(K2Loss()), z, zt)
    torch.testing.assert_close(through_k2, exact_gradient(z, zt), rtol=0, atol=1e-14)


def test_policy_gradient_is_unbiased_with_k1_and_biased_with_k3():
    z, zt = two_models()
    got = expected_gradient(build_loss(PolicyGradientLoss()), z, zt)
    torch.testing.assert_close(got, exact_gradient(z, zt), rtol=0, atol=1e-14)
    log_p, log_q = z.log_softmax(0), zt.log_softmax(0)
    k3 = (log_q - log_p).exp() - 1 + log_p - log_q
    biased = expectation_through(lambda p, q: k3.detach() * p, z, zt)
    assert (biased - exact_gradient(z, zt)).abs().max() > 1e-2


def test_policy_gradient_corrects_for_a_sampler_that_is_not_the_student():
    z, zt = two_models()
    mu = (z + 0.5 * two_models(seed=5)[0]).softmax(0)
    got = expected_gradient(build_loss(PolicyGradientLoss()), z, zt, mu)
    torch.testing.assert_close(got, exact_gradient(z, zt), rtol=0, atol=1e-14)
    uncorrected = expected_gradient(build_loss(PolicyGradientLoss(importance_ratio="none")), z, zt, mu)
    assert (uncorrected - exact_gradient(z, zt)).abs().max() > 1e-2


def test_the_reward_is_the_trainers_log_probability_not_the_samplers():
    z, zt = two_models()
    scores = SampledScores(z.log_softmax(0), zt.log_softmax(0))
    loss = build_loss(PolicyGradientLoss())
    advantage = loss.prepare(scores, one_token_each(VOCAB, two_models(7)[0].log_softmax(0)))
    assert torch.equal(advantage, zt.log_softmax(0) - z.log_softmax(0))


def test_extrapolation_moves_towards_the_teacher_raised_above_its_base():
    """Expected gradient of KL(p || q^l b^(1-l) / Z), l = 1.25; l = 1 is plain distillation."""
    (z, zt), (zb, _) = two_models(), two_models(8)
    tokens = replace(one_token_each(VOCAB, z.log_softmax(0)), teacher_base_logprobs=zb.log_softmax(0))
    for extrapolation in (1.0, 1.25):
        loss = build_loss(ExtrapolatedLoss(extrapolation=extrapolation))
        target = extrapolation * zt.log_softmax(0) + (1 - extrapolation) * zb.log_softmax(0)
        got = expected_gradient(loss, z, zt, tokens=tokens)
        torch.testing.assert_close(got, exact_gradient(z, target), rtol=0, atol=1e-14)
    entropy = float(-(zt.softmax(0) * zt.log_softmax(0)).sum())
    capped = build_loss(ExtrapolatedLoss(low_entropy=entropy + 0.1))
    got = expected_gradient(capped, z, zt, tokens=tokens)
    torch.testing.assert_close(got, exact_gradient(z, zt), rtol=0, atol=1e-14)


def test_a_distribution_level_value_as_advantage_has_no_expected_gradient():
    z, zt = two_models()
    kl = (z.softmax(0) * (z.log_softmax(0) - zt.log_softmax(0))).sum()
    assert expectation_through(lambda p, q: kl * p, z, zt).abs().max() < 1e-15


@pytest.mark.parametrize("support", ["student", "teacher", "union", "intersection"])
@pytest.mark.parametrize("kind", ["stop_gradient", "tail", "naive", "head_plus_sample", "full"])
def test_unified_gradient_formula(kind, support):
    """dL/dz_u = p_u (B_u - sum_v p_v B_v), B = A on S, and off S as the kind says."""
    z, zt = two_models(3)
    p, q, gap = z.softmax(0), zt.softmax(0), z.log_softmax(0) - zt.log_softmax(0)
    student, teacher = (set(t.topk(K).indices.tolist()) for t in (z, zt))
    chosen = {"student": student, "teacher": teacher, "union": student | teacher, "intersection": student & teacher}
    inside = torch.tensor([v in chosen[support] for v in range(VOCAB)])
    outside_value: Tensor | float = {
        "stop_gradient": 0.0,
        "naive": -1.0,
        "tail": float((p[~inside].sum() / q[~inside].sum()).log()),
        "full": gap,
        "head_plus_sample": gap,  # in the mean over y
    }[kind]
    b = torch.where(inside, gap, torch.as_tensor(outside_value, dtype=gap.dtype))
    expected = p * (b - (p * b).sum())
    loss = {
        "stop_gradient": lambda: build_loss(StopGradientLoss(k=K, support=support)),
        "naive": lambda: NaiveTopK(k=K, support=support),
        "tail": lambda: build_loss(TailLoss(k=K, support=support)),
        "full": lambda: build_loss(ReverseKLLoss()),
        "head_plus_sample": lambda: build_loss(HeadPlusSampleLoss(k=K, support=support)),
    }[kind]()
    torch.testing.assert_close(expected_gradient(loss, z, zt), expected, rtol=0, atol=1e-14)


def test_head_plus_sample_is_unbiased_on_policy_and_off_policy():
    z, zt = two_models(4)
    loss = build_loss(HeadPlusSampleLoss(k=K))
    for mu in (None, (0.7 * z).softmax(0)):
        torch.testing.assert_close(expected_gradient(loss, z, zt, mu), exact_gradient(z, zt), rtol=0, atol=1e-14)


def test_jsd_tends_to_its_endpoints():
    z, zt = two_models()
    for end, near, scale in ((0.0, 1e-7, 1e-7), (1.0, 1 - 1e-7, 1e-7)):
        at_end = expected_gradient(build_loss(JSDLoss(beta=end)), z, zt)
        close = expected_gradient(build_loss(JSDLoss(beta=near)), z, zt) / scale
        torch.testing.assert_close(close, at_end, rtol=1e-4, atol=1e-5)


# --- every loss, through fused_loss -------------------------------------------------------------------------------


def gradients(
    slot: SlotConfig, batch: Batch, hand_written: bool = True, shift: float = 0.0, teacher_shift: float = 0.0
) -> tuple[float, Tensor, Tensor, dict[str, Tensor]]:
    """(loss, d hidden, d weight, sums); the shifts add a constant to all logits of a model through one more feature."""
    loss, data = build_loss(slot), make_data(batch)
    tokens = with_payload(data, loss.needs.need, K)

    def widen(hidden: Tensor, weight: Tensor, by: float) -> tuple[Tensor, Tensor]:
        more = torch.cat([hidden, torch.full_like(hidden[:, :1], by)], 1)
        return more, torch.cat([weight, torch.ones_like(weight[:, :1])], 1)

    hidden, weight = widen(data.hidden, data.weight, shift)
    teacher_hidden, teacher_weight = widen(data.teacher_hidden, data.teacher_weight, teacher_shift)
    if tokens.teacher_hidden is not None:
        tokens = replace(tokens, teacher_hidden=teacher_hidden)
    hidden.requires_grad_()
    weight.requires_grad_()
    shard = dense_shard(batch.vocab)
    count = max(1.0, float(next(iter(loss.component_masks(tokens).values())).sum()))
    out = fused_loss(
        loss,
        hidden,
        OutputLayer(weight, shard),
        OutputLayer(teacher_weight, shard),
        tokens,
        dict.fromkeys(loss.components, count),
        chunk_tokens=5,
        hand_written=hand_written,
    )
    dhidden, dweight = torch.autograd.grad(out.loss, (hidden, weight))
    width = data.hidden.shape[1]
    return float(out.loss.detach()), dhidden[:, :width], dweight[:, :width], dict(out.sums)


def ids_of(slot: SlotConfig) -> str:
    return "-".join(str(v) for v in vars(slot).values())


@pytest.mark.parametrize("slot", LOSSES, ids=ids_of)
def test_a_constant_on_all_logits_of_a_model_changes_nothing(slot):
    batch = Batch(lost="none", vocab=23, k=K)
    plain = gradients(slot, batch)
    for shift, teacher_shift in ((37.0, 0.0), (0.0, -20.0)):
        moved = gradients(slot, batch, shift=shift, teacher_shift=teacher_shift)
        assert abs(moved[0] - plain[0]) < 1e-11
        torch.testing.assert_close(moved[1], plain[1], rtol=0, atol=1e-11)


@pytest.mark.parametrize("hand_written", [True, False])
@pytest.mark.parametrize("slot", LOSSES, ids=ids_of)
def test_zero_loss_and_gradient_where_student_and_teacher_agree(slot, hand_written):
    loss, dhidden, dweight, _ = gradients(slot, Batch(match=True, lost="none", vocab=23), hand_written)
    if build_loss(slot).zero_at_match:
        assert abs(loss) < 1e-14 and dhidden.abs().max() < 1e-14 and dweight.abs().max() < 1e-14
    else:
        assert dhidden.abs().max() > 1e-3


def test_naive_top_k_moves_a_student_that_equals_its_teacher():
    z, _ = two_models()
    assert expected_gradient(NaiveTopK(k=K), z, z).abs().max() > 1e-2


@contextlib.contextmanager
def frozen(values: list[Tensor], replay: bool) -> Iterator[None]:
    """Record what every `detach` returned, or hand the recorded values out again: stop-gradients held constant."""
    original, recorded = torch.Tensor.detach, iter(list(values))

    def detach(tensor: Tensor) -> Tensor:
        if replay:
            return next(recorded)
        values.append(original(tensor).clone())
        return values[-1]

    torch.Tensor.detach = detach  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.detach = original  # type: ignore[method-assign]


@pytest.mark.parametrize("slot", LOSSES, ids=ids_of)
def test_gradient_is_that_of_the_surrogate_with_its_stop_gradients_frozen(slot):
    loss, data = build_loss(slot), make_data(Batch(lost="none", vocab=23, k=K))
    tokens = with_payload(data, loss.needs.need, K)
    models, rows = (data.logits, data.teacher_logits), torch.arange(len(tokens))
    log_p, log_q = (z.log_softmax(1)[rows, tokens.ids] for z in models)
    entropies = [LogitsView(z).entropy() for z in models]
    known = log_q if loss.needs.need != Need.NOTHING else None
    prepared = loss.prepare(SampledScores(log_p, known, *entropies), tokens)
    teacher = LogitsView(data.teacher_logits) if loss.needs.need != Need.NOTHING else None
    stops: list[Tensor] = []

    def surrogate(hidden: Tensor, replay: bool) -> float:
        with frozen(stops, replay), torch.no_grad():
            values = loss.evaluate(LogitsView(hidden @ data.weight.T), teacher, tokens, prepared).losses.values()
            return float(sum(values).mean())

    surrogate(data.hidden, replay=False)
    direction = make_data(Batch(seed=9)).hidden
    step = 1e-5
    ahead, behind = (surrogate(data.hidden + s * step * direction, replay=True) for s in (1, -1))
    _, dhidden, _, _ = gradients(slot, Batch(lost="none", vocab=23, k=K))
    assert (ahead - behind) / (2 * step) == pytest.approx(float((dhidden * direction).sum()), abs=2e-9)


@pytest.mark.parametrize("hand_written", [True, False])
@pytest.mark.parametrize("slot", LOSSES, ids=ids_of)
def test_logits_of_80_stay_finite_in_float32(slot, hand_written):
    batch = Batch(lost="none", vocab=23, dtype=torch.float32, scale=60.0, k=K)
    assert make_data(batch).logits.abs().max() > 80
    loss, dhidden, dweight, sums = gradients(slot, batch, hand_written)
    # The sampler is the student plus noise, so that ratios stay moderate; everything else is as extreme as it gets.
    assert math.isfinite(loss) and dhidden.isfinite().all() and dweight.isfinite().all()
    assert all(total.isfinite().all() for total in sums.values())


SERVED = [
    TailLoss(k=K, teacher="scores"), TailLoss(k=K, teacher="scores", support="teacher", divergence="jsd"),
    StopGradientLoss(k=K, teacher="scores"), RenormalisedLoss(k=K, teacher="scores", support="intersection"),
    K2Loss(), PolicyGradientLoss(), PolicyGradientLoss(discount=1.0), TrustRegionLoss(outlier="clip"),
]  # fmt: skip


@pytest.mark.parametrize("slot", SERVED, ids=ids_of)
def test_an_exact_zero_of_a_served_teacher_drops_its_token_and_is_counted(slot):
    loss, data = build_loss(slot), make_data(Batch(lost="none", vocab=23))
    tokens = with_payload(data, loss.needs.need, K)
    zero = torch.zeros(len(tokens), dtype=torch.bool)
    zero[[2, 7]] = True

    def answer(tokens: TokenBatch) -> tuple[float, Tensor, dict[str, Tensor]]:
        hidden = data.hidden.clone().requires_grad_()
        mask = loss.component_masks(tokens)
        out = fused_loss(
            loss, hidden, OutputLayer(data.weight, dense_shard(23)), None, tokens,
            {name: float(m.sum()) for name, m in mask.items()},
        )  # fmt: skip
        return float(out.loss.detach()), torch.autograd.grad(out.loss, hidden)[0], dict(out.sums)

    if tokens.teacher_sampled_logprobs is not None:
        served = replace(tokens, teacher_sampled_logprobs=tokens.teacher_sampled_logprobs.masked_fill(zero, -torch.inf))
    else:
        scores = tokens.teacher_id_logprobs.clone()
        scores[zero, 1] = -torch.inf
        served = replace(tokens, teacher_id_logprobs=scores)
    got, dropped = answer(served), answer(replace(tokens, teacher_valid=~zero))
    assert got[0] == dropped[0] and math.isfinite(got[0])
    assert torch.equal(got[1], dropped[1])
    assert got[2]["teacher_zero"].tolist() == [2, len(tokens)] and got[2]["teacher_missing"][0] == 0
    assert dropped[2]["teacher_missing"].tolist() == [2, len(tokens)]
    assert all(got[2][name][1] == len(tokens) - 2 for name in loss.components)


BF16_LOSS, BF16_GRADIENT = 2e-5, 2.0**-8
"""Stated bounds, relative: logits, normalisers and sums are float32; the gradient of the hidden states is rounded to
bfloat16 once at the end, half a unit in its 8 bits at every element (and the largest element sets the scale)."""


@pytest.mark.parametrize("slot", LOSSES, ids=ids_of)
def test_bfloat16_is_within_its_bound_of_float64(slot):
    batch = Batch(lengths=(9, 12), lost="none", vocab=301, hidden=32, teacher_hidden=24)
    loss, data = build_loss(slot), make_data(batch)
    rounded = [t.bfloat16() for t in (data.hidden, data.weight, data.teacher_hidden, data.teacher_weight)]
    raised = [t.double() for t in rounded]
    results = []
    for hidden, weight, teacher_hidden, teacher_weight in (rounded, raised):
        exact = replace(data, hidden=raised[0], weight=raised[1], teacher_hidden=raised[2], teacher_weight=raised[3])
        tokens = with_payload(exact, loss.needs.need, K)
        if tokens.teacher_hidden is not None:
            tokens = replace(tokens, teacher_hidden=teacher_hidden)
        hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        weight.main_grad = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        out = fused_loss(
            loss, hidden, OutputLayer(weight, dense_shard(301)), OutputLayer(teacher_weight, dense_shard(301)), tokens,
            dict.fromkeys(loss.components, float(len(tokens))),
        )  # fmt: skip
        out.loss.backward()
        results.append((float(out.loss.detach()), hidden.grad.double(), weight.main_grad.double()))
    (value, dhidden, dweight), (value64, dhidden64, dweight64) = results
    assert abs(value - value64) <= BF16_LOSS * max(1.0, abs(value64))
    assert (dhidden - dhidden64).abs().max() <= BF16_GRADIENT * dhidden64.abs().max()
    assert (dweight - dweight64).abs().max() <= 1e-4 * dweight64.abs().max()


def test_a_small_tail_keeps_its_precision_in_float32():
    """Vocabulary of 152k: a logsumexp with the support left out, against log(1 - mass) which loses everything."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 151_936, generator=generator, dtype=torch.float64)
    ids = torch.arange(64).unsqueeze(0)
    for mass in (7e-3, 1e-4, 1e-6):
        z = logits.clone()
        z[:, :64] += torch.log(torch.tensor((1 - mass) / mass)) + z[:, 64:].logsumexp(1) - z[:, :64].logsumexp(1)
        exact = z.log_softmax(1)[:, 64:].logsumexp(1)
        view = LogitsView(z.float())
        assert abs(float(view.log_tail(ids) - exact)) < 2e-6
        by_difference = torch.log1p(-view.mass(ids))
        assert mass > 1e-3 or abs(float(by_difference - exact)) > 1e-4
    torch.testing.assert_close(blocked_logsumexp(logits), logits.logsumexp(1))
