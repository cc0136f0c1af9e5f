"""Tokens that the student did not draw get the loss of their prefix slot, and nothing of the student's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nemo_opd.config import (
    JSDLoss,
    MixedPrefix,
    PolicyGradientLoss,
    ReverseKLLoss,
    SlotConfig,
    TeacherPrefix,
    TruncatedImportanceWeight,
    TrustRegionLoss,
)
from nemo_opd.losses import build_loss, build_weight, for_prefix
from nemo_opd.types import Author, TokenBatch
from nemo_opd.vocab.fused import OutputLayer, fused_loss
from nemo_opd.vocab.shard import dense_shard
from tests.helpers.losses import Batch, make_data, with_payload

VOCAB = 29
BATCH = Batch(lengths=(5, 3, 4), begun=2, author=Author.TEACHER, lost="none")
DATA = make_data(BATCH)


def gradient(
    slot: SlotConfig, prefix: SlotConfig, tokens: TokenBatch | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """(d hidden, sums) with the global counts as normalisers."""
    loss = for_prefix(build_loss(slot), prefix)
    tokens = tokens or with_payload(DATA, loss.needs.need, 5)
    hidden = DATA.hidden.clone().requires_grad_()
    normalisers = {name: max(1.0, float(mask.sum())) for name, mask in loss.component_masks(tokens).items()}
    shard = dense_shard(VOCAB)
    out = fused_loss(
        loss, hidden, OutputLayer(DATA.weight, shard), OutputLayer(DATA.teacher_weight, shard), tokens, normalisers,
        build_weight(TruncatedImportanceWeight(clamp=0.9)) if slot.importance_ratio == "none" else None,
    )  # fmt: skip
    return torch.autograd.grad(out.loss, hidden)[0], dict(out.sums)


@pytest.mark.parametrize(
    "slot",
    [
        TrustRegionLoss(k=5),
        TrustRegionLoss(k=5, importance_ratio="none"),
        PolicyGradientLoss(discount=1.0, length_normalised=True),
        PolicyGradientLoss(clip_ratio=0.2),
    ],
    ids=str,
)
def test_a_prefix_gets_its_cross_entropy_and_never_a_policy_gradient(slot: SlotConfig) -> None:
    prefix = TeacherPrefix(loss_weight=0.25)
    got, sums = gradient(slot, prefix)
    theirs = DATA.tokens.author == int(Author.TEACHER)
    one_hot = torch.nn.functional.one_hot(DATA.tokens.ids, VOCAB)
    cross_entropy = 0.25 / 6 * (DATA.logits.softmax(1) - one_hot) @ DATA.weight
    torch.testing.assert_close(got[theirs], cross_entropy[theirs], rtol=0, atol=1e-14)
    assert sums["teacher_cross_entropy"][1] == 6

    other = with_payload(DATA, for_prefix(build_loss(slot), prefix).needs.need, 5)
    if other.teacher_sampled_logprobs is not None:
        changed = torch.where(theirs, other.teacher_sampled_logprobs - 3.0, other.teacher_sampled_logprobs)
        other = replace(other, teacher_sampled_logprobs=changed)
    else:
        other = replace(other, teacher_hidden=torch.where(theirs[:, None], -other.teacher_hidden, other.teacher_hidden))
    again, _ = gradient(slot, prefix, other)
    assert torch.equal(got, again), "what the teacher thinks of its own tokens is in no advantage, nor in a return"


def test_the_students_tokens_do_not_notice_the_prefix() -> None:
    own = DATA.tokens.author == int(Author.STUDENT)
    slot = PolicyGradientLoss(discount=0.5)
    with_prefix, _ = gradient(slot, TeacherPrefix())
    loss = build_loss(slot)
    tokens = with_payload(DATA, loss.needs.need, 5).select(own)
    hidden = DATA.hidden[own].clone().requires_grad_()
    out = fused_loss(loss, hidden, OutputLayer(DATA.weight, dense_shard(VOCAB)), None, tokens, {loss.name: 6.0})
    torch.testing.assert_close(with_prefix[own], torch.autograd.grad(out.loss, hidden)[0], rtol=0, atol=1e-15)


def test_components_of_a_mixture_have_names_factors_and_counts_of_their_own() -> None:
    data = make_data(replace(BATCH, author=Author.DATASET))
    loss = for_prefix(build_loss(JSDLoss()), MixedPrefix(on_policy_share=0.75))
    assert loss.components == ("jsd", "dataset_jsd") and loss.zero_at_match
    assert [part.factor for part in loss.parts] == [0.75, 0.25]
    masks = loss.component_masks(data.tokens)
    assert not (masks["jsd"] & masks["dataset_jsd"]).any() and (masks["jsd"] | masks["dataset_jsd"]).all()
    with_sft = for_prefix(build_loss(ReverseKLLoss()), MixedPrefix(loss="cross_entropy", loss_weight=0.1))
    assert with_sft.components == ("reverse_kl", "dataset_cross_entropy") and not with_sft.zero_at_match
    assert [part.factor for part in with_sft.parts] == [1.0, 0.1]
