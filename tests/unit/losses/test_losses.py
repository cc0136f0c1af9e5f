"""What losses say about themselves, what is refused, and losses as NeMo modules."""

from __future__ import annotations

import typing
from dataclasses import replace

import pytest
import torch
from nemo.core.classes import Loss

from nemo_opd import losses
from nemo_opd.config import (
    REFUSED_LOSSES,
    SLOTS,
    CrossEntropyLoss,
    EntropyAwareLoss,
    EntropyWeight,
    ExtrapolatedLoss,
    IcePopWeight,
    JSDLoss,
    MiniLLMLoss,
    PolicyGradientLoss,
    PrefixWeight,
    ReverseKLLoss,
    SequenceImportanceWeight,
    SlotConfig,
    StopGradientLoss,
    TailLoss,
    TruncatedImportanceWeight,
    TrustRegionLoss,
    UnitWeight,
)
from nemo_opd.errors import ConfigError
from nemo_opd.losses import DistributionLoss, SampledTokenLoss, build_loss, build_weight
from nemo_opd.losses.advantage import SampledReverseKL
from nemo_opd.losses.policy_gradient import PolicyGradient
from nemo_opd.losses.reverse_kl import ReverseKL
from nemo_opd.types import Need
from nemo_opd.vocab.fused import OutputLayer, fused_loss
from nemo_opd.vocab.objective import SampledScores
from nemo_opd.vocab.shard import dense_shard
from tests.helpers.losses import Batch, make_data, with_payload


def test_schema_and_registry_name_the_same_losses_and_weights():
    assert set(losses.LOSSES) == set(SLOTS["loss"])
    assert set(losses.WEIGHTS) | {"unit"} == set(SLOTS["weight"])


@pytest.mark.parametrize("name", sorted(SLOTS["loss"]))
def test_every_loss_is_a_nemo_module_of_one_kind_with_typed_ports(name):
    loss = build_loss(SLOTS["loss"][name]())
    assert isinstance(loss, Loss) and isinstance(loss, DistributionLoss) != isinstance(loss, SampledTokenLoss)
    assert {"student_logits", "token_ids"} <= set(loss.input_types) and set(loss.output_types) == {"loss"}
    assert (loss.needs.need == Need.NOTHING) == (not SLOTS["loss"][name].needs_teacher)
    assert typing.get_type_hints(type(loss).component_masks)


@pytest.mark.parametrize("name", sorted(REFUSED_LOSSES))
def test_biased_losses_are_refused_with_reason_and_alternatives(name):
    with pytest.raises(ConfigError, match=f"loss.name: got {name}; expected .*; use "):
        build_loss(SlotConfig(name=name))


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"one of .*reverse_kl"):
        build_loss(SlotConfig(name="revers_kl"))
    with pytest.raises(ConfigError, match=r"one of .*icepop"):
        build_weight(SlotConfig(name="ice"))
    assert build_weight(UnitWeight()) is None


@pytest.mark.parametrize(
    "slot",
    [
        JSDLoss(beta=1.5),
        TailLoss(k=0),
        TailLoss(support="both"),
        TailLoss(divergence="k1"),
        TailLoss(support="union", teacher="scores"),
        StopGradientLoss(teacher="none"),
        PolicyGradientLoss(clip_ratio=1.5),
        PolicyGradientLoss(clip_ratio=0.2, importance_ratio="none"),
        PolicyGradientLoss(advantage_floor=1.0),
        PolicyGradientLoss(advantage_clip=-1.0),
        PolicyGradientLoss(discount=1.5),
        PolicyGradientLoss(length_normalised=True),
        PolicyGradientLoss(importance_ratio="both"),
        ExtrapolatedLoss(extrapolation=0.0),
        ExtrapolatedLoss(low_entropy=-1.0),
        EntropyAwareLoss(outside="clip"),
        EntropyAwareLoss(k=0),
        EntropyAwareLoss(entropy_threshold=-1.0),
        MiniLLMLoss(discount=0.0),
        MiniLLMLoss(clip_ratio=1.0),
        TrustRegionLoss(trust="never"),
        TrustRegionLoss(outlier="reverse_kl"),
        TrustRegionLoss(k=0),
        TrustRegionLoss(outlier_clip=0.0),
        TrustRegionLoss(importance_ratio="both"),
    ],
    ids=str,
)
def test_impossible_parameters_are_refused(slot):
    with pytest.raises(ConfigError):
        build_loss(slot)


@pytest.mark.parametrize(
    "slot",
    [
        TruncatedImportanceWeight(clamp=0.0),
        IcePopWeight(low=5.0, high=1.0),
        PrefixWeight(gamma=-1.0),
        EntropyWeight(keep=0.0),
        EntropyWeight(of="both"),
    ],
    ids=str,
)
def test_impossible_weights_are_refused(slot):
    with pytest.raises(ConfigError):
        build_weight(slot)


def test_a_distribution_level_value_is_no_advantage():
    with pytest.raises(TypeError, match="expected gradient is zero"):
        PolicyGradient(advantage=ReverseKL())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="expected gradient is zero"):
        build_loss(PolicyGradientLoss(advantage="reverse_kl"))
    assert isinstance(PolicyGradient(advantage=SampledReverseKL()).advantage, SampledReverseKL)


def test_a_weight_that_needs_the_teachers_sampled_scores_says_so():
    data = make_data(Batch())
    with pytest.raises(TypeError, match="log-probability of the written tokens"):
        build_weight(PrefixWeight()).factors(SampledScores(data.tokens.sampler_logprobs), data.tokens)


def test_tokens_that_were_not_drawn_keep_the_factor_one():
    data = make_data(Batch())
    tokens = replace(data.tokens, sampler_logprobs=data.tokens.sampler_logprobs.clone())
    tokens.sampler_logprobs[:5] = torch.nan
    for slot in (TruncatedImportanceWeight(clamp=1.0), IcePopWeight(), SequenceImportanceWeight(low=0.0, high=1e9)):
        factor, metrics = build_weight(slot).factors(SampledScores(data.tokens.sampler_logprobs + 3.0), tokens)
        assert factor[:5].tolist() == [1.0] * 5 and factor.isfinite().all()
        assert set(metrics) == set(build_weight(slot).metric_names)


@pytest.mark.parametrize(
    "slot",
    [
        ReverseKLLoss(),
        TailLoss(k=5),
        PolicyGradientLoss(),
        CrossEntropyLoss(),
        EntropyAwareLoss(k=5),
        MiniLLMLoss(),
        TrustRegionLoss(k=5, trust="expected"),
        ExtrapolatedLoss(),
    ],
    ids=str,
)
def test_called_as_a_module_a_loss_equals_its_fused_mean(slot):
    loss, data = build_loss(slot), make_data(Batch(lengths=(11,), lost="some"))
    tokens = with_payload(data, loss.needs.need, 5)
    hidden = data.hidden.clone().requires_grad_()
    normalisers = {name: float(mask.sum()) for name, mask in loss.component_masks(tokens).items()}
    fused = fused_loss(
        loss, hidden, OutputLayer(data.weight, dense_shard(29)), OutputLayer(data.teacher_weight, dense_shard(29)),
        tokens, normalisers,
    ).loss  # fmt: skip
    ports = {"student_logits": hidden @ data.weight.T, "token_ids": tokens.ids}
    ports["sampler_logprobs"] = tokens.sampler_logprobs
    if loss.needs.need == Need.FULL:
        ports["teacher_logits"] = data.teacher_logits
    if loss.needs.need == Need.SAMPLED:
        ports["teacher_logprobs"] = tokens.teacher_sampled_logprobs.nan_to_num(-1.0)
    if loss.needs.base:
        ports["teacher_base_logprobs"] = tokens.teacher_base_logprobs.nan_to_num(-1.0)
    if loss.needs.need != Need.NOTHING:
        ports["mask"] = tokens.teacher_valid
    module = loss(**ports)
    assert float(module.detach()) == pytest.approx(float(fused.detach()), abs=1e-12)
    mine, theirs = (torch.autograd.grad(value, hidden)[0] for value in (module, fused))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_the_most_undecided_tokens_are_kept_and_make_up_for_the_others():
    data = make_data(Batch(lengths=(10, 3, 1), lost="none"))
    tokens = data.tokens
    entropy = torch.tensor([3.0, 1, 2, 9, 8, 7, 6, 5, 4, 0, 1, 3, 2, 0.5], dtype=torch.float64)
    weight = build_weight(EntropyWeight(keep=0.3))
    factor, _ = weight.factors(SampledScores(tokens.sampler_logprobs, student_entropy=entropy), tokens)
    kept = torch.tensor([0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 1, 0, 1]).bool()
    assert torch.equal(factor > 0, kept)
    torch.testing.assert_close(factor[kept], torch.tensor([10 / 3] * 3 + [3.0, 1.0], dtype=torch.float64))
    shuffled = torch.randperm(len(entropy), generator=torch.Generator().manual_seed(0))
    again, _ = weight.factors(
        SampledScores(tokens.sampler_logprobs, student_entropy=entropy[shuffled]), tokens.select(shuffled)
    )
    assert torch.equal(again, factor[shuffled])
    with pytest.raises(TypeError, match="whole distribution"):
        build_weight(EntropyWeight(of="teacher")).factors(SampledScores(tokens.sampler_logprobs), tokens)


def test_ports_are_checked():
    loss = build_loss(ReverseKLLoss())
    with pytest.raises(TypeError, match="shape mismatch"):
        loss(student_logits=torch.zeros(2, 3, 5), token_ids=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(TypeError, match="no corresponding input_type"):
        loss(student_logits=torch.zeros(2, 5), token_ids=torch.zeros(2, dtype=torch.int64), logits=torch.zeros(2, 5))


def test_a_served_teacher_does_not_answer_a_full_vocabulary_loss():
    loss = build_loss(ReverseKLLoss())
    with pytest.raises(TypeError, match="whole vocabulary"):
        loss(
            student_logits=torch.zeros(2, 5),
            token_ids=torch.zeros(2, dtype=torch.int64),
            teacher_logprobs=torch.zeros(2),
        )
