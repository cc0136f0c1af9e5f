"""What the fused path promises beyond numbers: where gradients go, what is refused, how much is communicated."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nemo_opd.config import (
    CrossEntropyLoss,
    ForwardKLLoss,
    HeadPlusSampleLoss,
    JSDLoss,
    K2Loss,
    PolicyGradientLoss,
    RenormalisedLoss,
    ReverseKLLoss,
    SkewForwardKLLoss,
    SkewReverseKLLoss,
    StopGradientLoss,
    TailLoss,
)
from nemo_opd.losses import DistributionLoss, build_loss
from nemo_opd.types import Author, Need, TeacherNeeds
from nemo_opd.vocab.collectives import counted
from nemo_opd.vocab.fused import OutputLayer, fused_loss
from nemo_opd.vocab.shard import VocabShard, dense_shard, reshard_rows
from tests.helpers.losses import Batch, Case, Layout, assemble, group_of, make_data, solve_one, with_payload

SHARD = dense_shard(29)


class Setup:
    """A batch on one process, with what `fused_loss` takes."""

    def __init__(self, slot=None, **batch) -> None:
        self.loss = build_loss(slot or ReverseKLLoss())
        self.data = make_data(Batch(**batch))
        self.tokens = with_payload(self.data, self.loss.needs.need, 5)
        self.hidden = self.data.hidden.clone().requires_grad_()
        self.weight = self.data.weight.clone().requires_grad_()
        self.teacher = OutputLayer(self.data.teacher_weight, SHARD)

    def run(self, **options):
        arguments = {
            "loss": self.loss,
            "hidden": self.hidden,
            "output": OutputLayer(self.weight, SHARD),
            "teacher_output": self.teacher,
            "tokens": self.tokens,
            "normalisers": dict.fromkeys(self.loss.components, 3.0),
            "chunk_tokens": 4,
        }
        return fused_loss(**{**arguments, **options})


def test_main_grad_is_added_to_and_autograd_gets_a_dummy():
    plain, setup = Setup(), Setup()
    plain.run().loss.backward()
    setup.weight.main_grad = torch.ones_like(setup.weight)
    setup.run().loss.backward()
    torch.testing.assert_close(setup.weight.main_grad - 1.0, plain.weight.grad, rtol=0, atol=1e-14)
    assert setup.weight.grad_added_to_main_grad is True
    assert setup.weight.grad.shape == setup.weight.shape and not setup.weight.grad.any()
    assert torch.equal(setup.hidden.grad, plain.hidden.grad)


def test_a_tied_embeddings_own_gradient_survives_beside_main_grad():
    setup = Setup()
    setup.weight.main_grad = torch.zeros_like(setup.weight)
    (setup.run().loss + 2.0 * setup.weight[3].sum()).backward()
    assert setup.weight.grad[3].tolist() == [2.0] * 6 and not setup.weight.grad[4].any()


def test_the_announced_scale_is_in_main_grad_and_another_is_refused():
    plain, scaled, wrong = Setup(), Setup(), Setup()
    plain.run().loss.backward()
    for setup in (scaled, wrong):
        setup.weight.main_grad = torch.zeros_like(setup.weight)
    (scaled.run(grad_scale=8.0).loss * 8.0).backward()
    torch.testing.assert_close(scaled.weight.main_grad, 8.0 * plain.weight.grad)
    torch.testing.assert_close(scaled.hidden.grad, 8.0 * plain.hidden.grad)
    with pytest.raises(RuntimeError, match=r"grad_scale=8\.0"):
        (wrong.run().loss * 8.0).backward()


def test_without_main_grad_any_scale_works_and_backward_runs_once():
    plain, setup = Setup(), Setup()
    plain.run().loss.backward()
    loss = setup.run().loss * 8.0
    loss.backward(retain_graph=True)
    torch.testing.assert_close(setup.weight.grad, 8.0 * plain.weight.grad)
    with pytest.raises(RuntimeError, match="ran twice"):
        loss.backward()


def test_main_grad_in_float32_under_a_bfloat16_layer():
    exact, setup = Setup(), Setup(dtype=torch.bfloat16)
    setup.weight.main_grad = torch.zeros(29, 6)
    exact.run().loss.backward()
    setup.run().loss.backward()
    assert setup.weight.main_grad.dtype == torch.float32 and setup.hidden.grad.dtype == torch.bfloat16
    torch.testing.assert_close(setup.weight.main_grad.double(), exact.weight.grad, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("how", ["gradient=False", "no_grad"])
def test_forward_only_adds_nothing_anywhere(how):
    plain, setup = Setup(), Setup()
    setup.weight.main_grad = torch.zeros_like(setup.weight)
    with torch.set_grad_enabled(how != "no_grad"):
        out = setup.run(gradient=how != "gradient=False")
    assert not out.loss.requires_grad and not setup.weight.main_grad.any()
    assert float(out.loss) == float(plain.run().loss.detach())


def test_a_frozen_output_layer_or_frozen_hidden_states():
    plain, frozen_weight, frozen_hidden = Setup(), Setup(), Setup()
    plain.run().loss.backward()
    frozen_weight.weight.requires_grad_(False)
    frozen_weight.run().loss.backward()
    assert torch.equal(frozen_weight.hidden.grad, plain.hidden.grad) and frozen_weight.weight.grad is None
    frozen_hidden.hidden.requires_grad_(False)
    frozen_hidden.run().loss.backward()
    assert torch.equal(frozen_hidden.weight.grad, plain.weight.grad)


def test_no_tokens_gives_a_differentiable_zero_and_the_same_names():
    full, empty = Setup(), Setup(lengths=())
    a, b = full.run(), empty.run()
    assert float(b.loss.detach()) == 0.0 and list(a.sums) == list(b.sums)
    b.loss.backward()
    assert empty.hidden.grad.shape == (0, 6) and not empty.weight.grad.any()
    # An answer without tokens may come without any payload at all.
    tokens = replace(empty.tokens, teacher_hidden=None)
    assert float(empty.run(tokens=tokens).loss.detach()) == 0.0


def test_sums_are_those_of_the_loss_and_of_the_metrics():
    setup = Setup(lost="some")
    out = setup.run()
    total, count = out.sums["reverse_kl"].tolist()
    assert total / 3.0 == pytest.approx(float(out.loss.detach()), abs=1e-12)
    assert count == int(setup.tokens.teacher_valid.sum()) < len(setup.tokens)
    p, q = setup.data.logits.softmax(1), setup.data.teacher_logits.softmax(1)
    valid = setup.tokens.teacher_valid
    assert float(out.sums["kl"][0]) == pytest.approx(float((p * (p / q).log()).sum(1)[valid].sum()), abs=1e-12)
    assert float(out.sums["teacher_entropy"][0]) == pytest.approx(float(-(q * q.log()).sum(1)[valid].sum()), abs=1e-12)
    assert float(out.sums["student_entropy"][0]) == pytest.approx(float(-(p * p.log()).sum()), abs=1e-12)
    written = p.gather(1, setup.tokens.ids.unsqueeze(1)).squeeze(1)
    ratio = (written / setup.tokens.sampler_logprobs.exp()).sum()
    assert float(out.sums["importance_ratio"][0]) == pytest.approx(float(ratio), abs=1e-12)
    assert out.sums["teacher_missing"].tolist() == [int((~valid).sum()), len(valid)]


def test_tokens_that_the_sampler_did_not_draw_have_no_ratio():
    setup = Setup(PolicyGradientLoss())
    tokens = replace(setup.tokens, sampler_logprobs=setup.tokens.sampler_logprobs.clone())
    tokens.sampler_logprobs[::2] = torch.nan
    out = setup.run(tokens=tokens)
    assert out.loss.isfinite() and out.sums["importance_ratio"][1] == len(tokens) - len(tokens.ids[::2])
    assert out.sums["policy_gradient"][1] == int((tokens.teacher_valid & tokens.sampler_logprobs.isfinite()).sum())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 6)}, r"hidden of shape \(2, 6\); expected \[11, 6\]"),
        ({"normalisers": {}}, "normalisers are {}; expected a positive number for each of"),
        ({"chunk_tokens": 0}, "chunk_tokens is 0"),
        ({"teacher_output": None}, "needs the teacher's whole distribution"),
        ({"teacher_output": OutputLayer(torch.zeros(30, 5), dense_shard(30))}, "reshard_rows"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Setup().run(**change)


def test_float16_and_wrong_row_counts_are_refused():
    with pytest.raises(ValueError, match="use bfloat16"):
        OutputLayer(torch.zeros(29, 6, dtype=torch.float16), SHARD)
    with pytest.raises(ValueError, match=r"expected \[29, hidden\]"):
        OutputLayer(torch.zeros(28, 6), SHARD)


class TwoComponents(DistributionLoss):
    """Reverse KL on what the student wrote, cross-entropy on what the teacher wrote."""

    name = "two"
    needs = TeacherNeeds(Need.FULL)
    zero_at_match = False
    components = ("kl_part", "ce_part")

    def component_masks(self, tokens):
        student = tokens.author == Author.STUDENT
        return {"kl_part": student & tokens.teacher_valid, "ce_part": ~student}

    def token_losses(self, student, teacher, tokens):
        kl = student.expectation(lambda log_p, log_q: log_p - log_q, teacher)
        return {"kl_part": kl, "ce_part": -student.logprob(tokens.ids)}


def test_each_component_has_its_own_mask_and_normaliser():
    setup = Setup(lost="some")
    setup.loss = TwoComponents()
    tokens = replace(setup.tokens, author=(setup.tokens.ids % 2).to(torch.int8))
    out = setup.run(tokens=tokens, normalisers={"kl_part": 7.0, "ce_part": 2.0})
    out.loss.backward()
    hidden = setup.data.hidden.clone().requires_grad_()
    log_p, log_q = (hidden @ setup.data.weight.T).log_softmax(1), setup.data.teacher_logits.log_softmax(1)
    masks = setup.loss.component_masks(tokens)
    kl = (log_p.exp() * (log_p - log_q)).sum(1)[masks["kl_part"]].sum() / 7.0
    ce = -log_p.gather(1, tokens.ids.unsqueeze(1)).squeeze(1)[masks["ce_part"]].sum() / 2.0
    assert float(out.loss.detach()) == pytest.approx(float((kl + ce).detach()), abs=1e-12)
    torch.testing.assert_close(setup.hidden.grad, torch.autograd.grad(kl + ce, hidden)[0], rtol=0, atol=1e-12)
    assert out.sums["ce_part"][1] == int(masks["ce_part"].sum())


# --- on two ranks -------------------------------------------------------------------------------------------------

# Collectives in forward per chunk; every loss adds one all-reduce of the hidden gradient.
FORWARD_COLLECTIVES = [
    (ReverseKLLoss(), 1),
    (ForwardKLLoss(), 1),
    (JSDLoss(), 2),
    (SkewForwardKLLoss(), 2),
    (SkewReverseKLLoss(), 2),
    (TailLoss(k=5), 2),
    (TailLoss(k=5, support="union", divergence="jsd"), 2),
    (TailLoss(k=5, teacher="scores"), 2),
    (StopGradientLoss(k=5, support="intersection"), 1),
    (RenormalisedLoss(k=5), 1),
    (HeadPlusSampleLoss(k=5), 1),
    (K2Loss(), 1),
    (PolicyGradientLoss(), 1),
    (CrossEntropyLoss(), 1),
]


def calls_on_ranks(rank: int) -> list[list[list[tuple[str, int]]]]:
    layout = Layout(tp=2, chunk=4)
    return [solve_one(rank, Case(slot), layout)["calls"] for slot, _ in FORWARD_COLLECTIVES]


def test_collectives_per_chunk_are_few_and_small(ranks2):
    chunks, batch = 3, Batch()
    assert -(-sum(batch.lengths) // 4) == chunks
    for (slot, expected), (calls,) in zip(FORWARD_COLLECTIVES, ranks2.run(calls_on_ranks)[0], strict=True):
        forward = [numel for name, numel in calls if name in ("gather", "all_reduce")]
        assert len(forward) == expected * chunks, slot
        # Statistics, ids and the logits of both models at up to two rankings of k = 5 candidates, never columns.
        assert max(forward) <= 4 * (8 + 2 * 3 * 5), slot
        assert [n for n, _ in calls if n not in ("gather", "all_reduce")] == ["all_reduce_hidden"] * chunks


def partial_gradients(rank: int) -> tuple[list[list[float]], list[list[float]]]:
    case, layout = Case(ReverseKLLoss()), Layout(tp=2, chunk=4)
    part = solve_one(rank, Case(ReverseKLLoss(), options=(("reduce_hidden", False),)), layout)
    return part["dhidden"][0].tolist(), solve_one(rank, case, layout)["dhidden"][0].tolist()


def test_hidden_gradients_can_be_left_as_parts_of_a_sum(ranks2):
    (mine, whole), (theirs, _) = (map(torch.tensor, pair) for pair in ranks2.run(partial_gradients))
    torch.testing.assert_close(mine + theirs, whole, rtol=0, atol=1e-6)
    assert (mine - whole).abs().max() > 1e-3


def reshard_on_ranks(rank: int) -> bool:
    group, _ = group_of(rank, Layout(tp=2))
    whole = torch.arange(22.0).view(11, 2)
    theirs, ours = VocabShard(11, rank * 8, 8, group), VocabShard(11, rank * 6, 6, group)
    local = torch.full((8, 2), -1.0)
    local[: theirs.valid] = whole[theirs.start : theirs.start + theirs.valid]
    moved = reshard_rows(local, theirs, ours)
    assert not moved[ours.valid :].any()
    return torch.equal(moved[: ours.valid], whole[ours.start : ours.start + ours.valid])


def test_another_padding_is_laid_out_anew(ranks2):
    assert ranks2.run(reshard_on_ranks) == [True, True]


def test_assemble_notices_ranks_that_disagree():
    share = solve_one(0, Case(ReverseKLLoss()), Layout())
    with pytest.raises(AssertionError):
        assemble(Case(ReverseKLLoss()), Layout(tp=2), [share, {**share, "loss": 0.0}])


def test_counting_stops_with_its_block():
    with counted() as log:
        Setup().run()
    assert log.count() == 0 and log.largest == 0
