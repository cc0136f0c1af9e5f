"""The overlap of top sets and the other always-on measurements, against dense references and over layouts."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from nemo_opd.config import (
    ForwardKLLoss,
    IcePopWeight,
    K2Loss,
    ReverseKLLoss,
    SlotConfig,
    StopGradientLoss,
    TailLoss,
)
from nemo_opd.losses import build_loss, build_weight
from nemo_opd.losses.by_author import ByAuthor
from nemo_opd.types import Author, Need
from nemo_opd.vocab.chunk import POSITIONS, always_measured
from nemo_opd.vocab.fused import OutputLayer, fused_loss
from nemo_opd.vocab.objective import Part
from nemo_opd.vocab.overlap import OVERLAP, picked_tokens
from nemo_opd.vocab.shard import dense_shard
from tests.helpers.losses import Batch, Case, Data, Layout, assemble, make_data, solve, with_payload
from tests.helpers.ranks import RankPool

K = 5
BATCH = Batch(lengths=(70, 30, 1))
MEASURED: list[SlotConfig] = [
    *[StopGradientLoss(k=K, support=s) for s in ("student", "teacher", "union", "intersection")],
    *[TailLoss(k=K, support=s, teacher="scores") for s in ("teacher", "intersection")],
]
ON_ALL = ("union", "intersection")


def sums_of(slot: SlotConfig, weight: SlotConfig | None = None, batch: Batch = BATCH, **options):
    loss, data = build_loss(slot), make_data(batch)
    return data, fused_loss(
        loss,
        data.hidden,
        OutputLayer(data.weight, dense_shard(29)),
        OutputLayer(data.teacher_weight, dense_shard(29)),
        with_payload(data, loss.needs.need, K),
        dict.fromkeys(loss.components, 3.0),
        weight=None if weight is None else build_weight(weight),
        chunk_tokens=16,
        **options,
    )


def dense_overlap(data: Data, k: int) -> torch.Tensor:
    tops = [logits.topk(k, dim=1).indices for logits in (data.logits, data.teacher_logits)]
    shared = [len(set(p) & set(q)) / k for p, q in zip(tops[0].tolist(), tops[1].tolist(), strict=True)]
    return torch.tensor(shared, dtype=torch.float64)


@pytest.mark.parametrize("slot", MEASURED, ids=lambda slot: f"{slot.name}-{slot.support}-{slot.teacher}")
@pytest.mark.parametrize("hand_written", [True, False])
def test_overlap_is_that_of_the_two_top_sets(slot, hand_written):
    data, out = sums_of(slot, hand_written=hand_written)
    expected, valid = dense_overlap(data, K), data.tokens.teacher_valid
    if slot.support not in ON_ALL:
        picked = picked_tokens(build_loss(slot), data.tokens, [0])[0]
        assert 2 <= len(picked) < len(valid) / 4
        valid = torch.zeros_like(valid).index_fill(0, picked, True)
    assert 0.0 < float(expected[valid].mean()) < 1.0
    assert out.sums[OVERLAP].tolist() == pytest.approx([float(expected[valid].sum()), int(valid.sum())], abs=1e-12)


@pytest.mark.parametrize(
    "slot", [TailLoss(k=K, teacher="scores"), ReverseKLLoss(), K2Loss()], ids=lambda slot: slot.name
)
def test_an_overlap_that_nobody_knows_is_not_reported(slot):
    assert OVERLAP not in sums_of(slot)[1].sums


def test_a_sixteenth_of_the_tokens_is_picked_whatever_the_chunks():
    loss, data = build_loss(MEASURED[0]), make_data(Batch(lengths=(4000, 3000), lost="none"))
    whole = picked_tokens(loss, data.tokens, [0])[0]
    parts = picked_tokens(loss, data.tokens, range(0, 7000, 100))
    assert torch.equal(whole, torch.cat([part + 100 * i for i, part in enumerate(parts)]))
    assert len(whole) == pytest.approx(7000 / 16, rel=0.15)


def test_sums_do_not_depend_on_the_layout(ranks2: RankPool, ranks1: RankPool):
    cases = [Case(slot, batch=BATCH) for slot in (*MEASURED, K2Loss())]
    one = Layout(chunk=1000)
    alone = ranks1.run(solve, [(case, one) for case in cases])
    for layout in (Layout(tp=2, chunk=7, pad_to=3), Layout(dp=2, chunk=16, packed=False)):
        shares = ranks2.run(solve, [(case, layout) for case in cases])
        for i, case in enumerate(cases):
            expected, got = (
                assemble(case, where, [share[i] for share in found]).sums
                for where, found in ((one, alone), (layout, shares))
            )
            names = always_measured(build_loss(case.loss))
            assert set(names) <= set(expected)
            for name in names:
                torch.testing.assert_close(got[name], expected[name], rtol=1e-6, atol=1e-9, msg=f"{name} {case.loss}")


def test_teacher_logprob_by_position():
    data, out = sums_of(ReverseKLLoss())
    tokens = data.tokens
    log_q = data.teacher_logits.log_softmax(1).gather(1, tokens.ids.unsqueeze(1)).squeeze(1)
    bounds = [*POSITIONS, 10**9]
    for start, end in itertools.pairwise(bounds):
        here = tokens.teacher_valid & (tokens.offset >= start) & (tokens.offset < end)
        expected = [float(log_q[here].sum()), int(here.sum())]
        assert out.sums[f"teacher_logprob_from_{start}"].tolist() == pytest.approx(expected, rel=1e-6)
    assert int(out.sums["teacher_logprob_from_64"][1]) in range(1, 7)
    assert out.sums["teacher_logprob"].tolist() == pytest.approx(
        [float(log_q[tokens.teacher_valid].sum()), int(tokens.teacher_valid.sum())]
    )


def test_importance_weights_out_of_bounds():
    data, out = sums_of(ReverseKLLoss())
    log_p = data.logits.log_softmax(1).gather(1, data.tokens.ids.unsqueeze(1)).squeeze(1)
    ratio = (log_p - data.tokens.sampler_logprobs).exp()
    outside = int(((ratio < 0.5) | (ratio > 2.0)).sum())
    assert 0 < outside < len(ratio)
    assert out.sums["importance_out_of_bounds"].tolist() == [outside, len(ratio)]


def test_a_weight_with_bounds_of_its_own_reports_its_own_share():
    data, out = sums_of(ReverseKLLoss(), IcePopWeight(low=0.9, high=1.1))
    log_p = data.logits.log_softmax(1).gather(1, data.tokens.ids.unsqueeze(1)).squeeze(1)
    ratio = (log_p - data.tokens.sampler_logprobs).exp()
    assert out.sums["importance_out_of_bounds"][0] == int(((ratio < 0.9) | (ratio > 1.1)).sum())


@pytest.mark.parametrize("weight", [None, IcePopWeight()], ids=["unit", "icepop"])
def test_tokens_are_kept_as_they_were_counted(weight):
    data, out = sums_of(ReverseKLLoss(), weight)
    expected = {"teacher_logprob", "sampled_kl", "kl", "student_entropy", *({"weight"} if weight else ())}
    assert set(out.tokens) == expected
    for name, values in out.tokens.items():
        assert values.shape == (len(data.tokens),) and values.dtype == torch.float32
        known = ~values.isnan()
        assert [float(values[known].double().sum()), int(known.sum())] == pytest.approx(out.sums[name].tolist())
    assert torch.equal(out.tokens["kl"].isnan(), ~data.tokens.teacher_valid)


def test_tokens_of_every_part_are_kept_in_their_places():
    data = make_data(replace(BATCH, lost="none"))
    tokens = replace(with_payload(data, Need.FULL, K), author=(data.tokens.ids % 2).to(torch.int8))
    everywhere = {name: 1.0 for name in ("reverse_kl", "off_policy/forward_kl")}
    other = Part(build_loss(ForwardKLLoss()), frozenset({Author.TEACHER}), 0.5, "off_policy/")
    layers = OutputLayer(data.weight, dense_shard(29)), OutputLayer(data.teacher_weight, dense_shard(29))
    loss = ByAuthor(Part(build_loss(ReverseKLLoss()), frozenset({Author.STUDENT})), other)
    mixed = fused_loss(loss, data.hidden, *layers, tokens, everywhere)
    plain = fused_loss(build_loss(ReverseKLLoss()), data.hidden, *layers, tokens, everywhere)
    assert 0 < int(tokens.author.sum()) < len(tokens)
    torch.testing.assert_close(mixed.tokens["kl"], plain.tokens["kl"])


def test_a_served_zero_is_not_kept():
    loss, data = build_loss(K2Loss()), make_data(replace(BATCH, lost="none"))
    tokens = with_payload(data, loss.needs.need, K)
    tokens.teacher_sampled_logprobs[3] = -torch.inf
    out = fused_loss(loss, data.hidden, OutputLayer(data.weight, dense_shard(29)), None, tokens, {"k2": 1.0})
    assert out.tokens["teacher_logprob"].isnan().nonzero().flatten().tolist() == [3]
    assert out.sums["teacher_logprob"][0].isfinite()
