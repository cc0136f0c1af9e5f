"""Every registered loss, spread over ranks in every way, against a dense reference: value and gradient in float64.

The product of all layouts is covered pairwise: every pair of values of two different factors occurs in some row of
`LAYOUTS` (checked below), and every loss goes through every row of its world size. Differences are at most 1e-10.
"""

from __future__ import annotations

import itertools
from dataclasses import fields, replace

import pytest

from nemo_opd.config import (
    SLOTS,
    CrossEntropyLoss,
    EntropyAwareLoss,
    EntropyWeight,
    ExtrapolatedLoss,
    ForwardKLLoss,
    GroupRelativeReward,
    HeadPlusSampleLoss,
    IcePopWeight,
    JSDLoss,
    K2Loss,
    MiniLLMLoss,
    MixedPrefix,
    PolicyGradientLoss,
    PrefixWeight,
    RenormalisedLoss,
    ReverseKLLoss,
    SequenceImportanceWeight,
    SkewForwardKLLoss,
    SkewReverseKLLoss,
    StopGradientLoss,
    TailLoss,
    TeacherPrefix,
    TruncatedImportanceWeight,
    TrustRegionLoss,
    VerifierPolicyGradientLoss,
)
from nemo_opd.types import Author
from tests.helpers.loss_reference import reference_answer
from tests.helpers.losses import Batch, Case, Layout, assemble, solve

TOLERANCE = 1e-10
K = 5
LOSSES = [
    ReverseKLLoss(),
    ForwardKLLoss(),
    *[JSDLoss(beta=b) for b in (0.0, 0.3, 1.0)],
    SkewForwardKLLoss(),
    SkewReverseKLLoss(),
    *[StopGradientLoss(k=K, support=s) for s in ("student", "teacher", "union", "intersection")],
    *[TailLoss(k=K, support=s) for s in ("student", "teacher", "union", "intersection")],
    *[TailLoss(k=K, divergence=d, beta=0.3) for d in ("forward", "jsd")],
    TailLoss(k=29, support="union"),
    *[RenormalisedLoss(k=K, support=s) for s in ("student", "teacher", "union", "intersection")],
    *[RenormalisedLoss(k=K, support="intersection", divergence=d, beta=0.3) for d in ("forward", "jsd")],
    *[HeadPlusSampleLoss(k=K, support=s) for s in ("student", "union")],
    *[TailLoss(k=K, support=s, teacher="scores") for s in ("student", "teacher", "intersection")],
    *[StopGradientLoss(k=K, support=s, teacher="scores") for s in ("student", "teacher")],
    RenormalisedLoss(k=K, support="intersection", teacher="scores", divergence="jsd"),
    K2Loss(),
    PolicyGradientLoss(),
    PolicyGradientLoss(clip_ratio=0.2),
    PolicyGradientLoss(advantage_clip=0.5, importance_ratio="none"),
    PolicyGradientLoss(advantage_floor=0.2, discount=0.9),
    PolicyGradientLoss(discount=1.0, length_normalised=True, clip_ratio=0.2),
    CrossEntropyLoss(),
    TrustRegionLoss(k=K),
    TrustRegionLoss(k=K, tail=True, trust="expected"),
    TrustRegionLoss(k=29, tail=True, importance_ratio="none"),
    TrustRegionLoss(k=K, outlier="mask"),
    TrustRegionLoss(k=K, outlier="clip", trust="expected"),
    EntropyAwareLoss(k=K, entropy_threshold=2.5),
    EntropyAwareLoss(k=K, entropy_threshold=2.5, outside="renormalised", importance_ratio="none"),
    ExtrapolatedLoss(),
    ExtrapolatedLoss(extrapolation=1.5, low_entropy=2.5, importance_ratio="none"),
    MiniLLMLoss(),
    MiniLLMLoss(discount=0.9, length_normalised=False, clip_ratio=None),
    VerifierPolicyGradientLoss(),
]
WEIGHTED = [
    Case(ReverseKLLoss(), TruncatedImportanceWeight(clamp=1.1)),
    Case(TailLoss(k=K), IcePopWeight(low=0.7, high=1.4)),
    Case(JSDLoss(), SequenceImportanceWeight(low=0.8, high=1.2)),
    Case(K2Loss(), PrefixWeight()),
    Case(TrustRegionLoss(k=K, importance_ratio="none"), TruncatedImportanceWeight(clamp=1.1)),
    Case(PolicyGradientLoss(), EntropyWeight()),
    Case(JSDLoss(), EntropyWeight(keep=0.3, of="teacher")),
    Case(MiniLLMLoss(), EntropyWeight(keep=0.7)),
    Case(PolicyGradientLoss(importance_ratio="none", discount=0.5), SequenceImportanceWeight(low=0.8, high=1.2)),
]
BEGUN_BY_TEACHER = Batch(lengths=(4, 2, 5, 2), begun=2, author=Author.TEACHER)
PARTLY_DATASET = Batch(lengths=(4, 2, 5, 2), begun=2, author=Author.DATASET)
BY_AUTHOR = [
    Case(TrustRegionLoss(k=K), batch=BEGUN_BY_TEACHER, prefix=TeacherPrefix(loss_weight=0.3)),
    Case(PolicyGradientLoss(discount=1.0), batch=BEGUN_BY_TEACHER, prefix=TeacherPrefix(loss_weight=2.0)),
    Case(JSDLoss(beta=0.3), batch=PARTLY_DATASET, prefix=MixedPrefix(on_policy_share=0.7)),
    Case(
        ReverseKLLoss(), TruncatedImportanceWeight(clamp=1.1), PARTLY_DATASET,
        prefix=MixedPrefix(loss="cross_entropy", loss_weight=0.2),
    ),
]  # fmt: skip
REWARD = GroupRelativeReward(weight=0.7, loss_weight=0.3, clip_low=0.2, clip_high=0.4)
REWARDED = [
    *[Case(loss, reward=REWARD) for loss in (ReverseKLLoss(), ForwardKLLoss(), SkewForwardKLLoss(), TailLoss(k=K))],
    Case(JSDLoss(beta=0.3), TruncatedImportanceWeight(clamp=1.1), reward=REWARD),
    Case(SkewReverseKLLoss(), SequenceImportanceWeight(low=0.8, high=1.2), reward=REWARD),
    Case(PolicyGradientLoss(discount=0.9), reward=REWARD),
    Case(CrossEntropyLoss(), reward=REWARD),
    Case(VerifierPolicyGradientLoss(), reward=GroupRelativeReward(weight=2.0, clip_low=None, clip_high=0.1)),
]
GENERIC = (("hand_written", False),)
CASES = [Case(loss) for loss in LOSSES] + WEIGHTED + BY_AUTHOR + REWARDED
THROUGH_AUTOGRAD = [replace(case, options=GENERIC) for case in CASES]

# tp, dp, cp, chunk, micro_batches, packed, pad_to
LAYOUTS = [
    Layout(1, 1, 1, 1000, 1, True, 0),
    Layout(1, 1, 1, 7, 4, True, 3),
    Layout(1, 1, 1, 1, 4, False, 0),
    Layout(2, 1, 1, 1, 4, True, 3),
    Layout(2, 1, 1, 1000, 1, False, 0),
    Layout(2, 1, 1, 7, 1, True, 3),
    Layout(1, 2, 1, 7, 1, False, 3),
    Layout(1, 1, 2, 1, 1, False, 3),
    Layout(1, 1, 2, 1000, 4, True, 0),
    Layout(4, 1, 1, 7, 1, False, 0),
    Layout(4, 1, 1, 1, 1, True, 3),
    Layout(4, 1, 1, 1000, 4, True, 3),
    Layout(2, 2, 1, 1000, 4, True, 3),
    Layout(2, 2, 1, 1, 4, False, 0),
    Layout(2, 1, 2, 7, 4, True, 0),
    Layout(2, 1, 2, 7, 1, False, 3),
    Layout(1, 2, 2, 1000, 1, False, 0),
    Layout(1, 2, 2, 7, 4, True, 3),
]
BY_WORLD = {w: [layout for layout in LAYOUTS if layout.tp * layout.dp * layout.cp == w] for w in (1, 2, 4)}


def test_every_pair_of_factor_values_occurs():
    values = {f.name: {getattr(layout, f.name) for layout in LAYOUTS} for f in fields(Layout)}
    for (a, of_a), (b, of_b) in itertools.combinations(values.items(), 2):
        for x, y in itertools.product(of_a, of_b):
            # One sequence per row makes as many micro-batches as there are sequences; and four ranks are at hand.
            if {a, b} == {"micro_batches", "packed"} or (x in (2, 4) and y in (2, 4) and {a, b} <= {"tp", "dp", "cp"}):
                continue
            assert any(getattr(r, a) == x and getattr(r, b) == y for r in LAYOUTS), f"no layout has {a}={x} and {b}={y}"


def test_every_registered_loss_and_weight_is_in_the_matrix():
    assert {case.loss.name for case in CASES} == set(SLOTS["loss"])
    assert {case.weight.name for case in CASES} == set(SLOTS["weight"])


def check(pool, jobs):
    shares = pool.run(solve, jobs, timeout=900.0)
    references = {}
    for i, (case, layout) in enumerate(jobs):
        key = repr((case.loss, case.weight, case.batch, case.prefix, case.reward))
        if key not in references:
            references[key] = reference_answer(case)
        got, expected = assemble(case, layout, [s[i] for s in shares]), references[key]
        error = max(
            abs(got.loss - expected.loss),
            float((got.dhidden - expected.dhidden).abs().max()) if got.dhidden.numel() else 0.0,
            float((got.dweight - expected.dweight).abs().max()),
        )
        assert error <= TOLERANCE, f"{error:.3g} for {case} under {layout}"


@pytest.mark.parametrize("world", [1, 2, 4])
def test_loss_and_gradient_equal_the_dense_reference(world, request):
    check(request.getfixturevalue(f"ranks{world}"), [(c, layout) for layout in BY_WORLD[world] for c in CASES])


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_generic_path_computes_the_same(world, request):
    """The same losses through their own autograd inside the chunk; in the second vocabulary some ranks hold no id."""
    layout = Layout(tp=world, chunk=4, pad_to=1)
    few_ids = [c for c in THROUGH_AUTOGRAD if getattr(c.loss, "k", 0) <= K]
    small = [replace(case, batch=Batch(vocab=5, lengths=(3, 2))) for case in few_ids]
    by_hand = [replace(case, options=()) for case in small]
    check(request.getfixturevalue(f"ranks{world}"), [(c, layout) for c in THROUGH_AUTOGRAD + small + by_hand])


@pytest.mark.parametrize("world", [1, 2, 4])
def test_nothing_to_train_on(world, request):
    """All teacher scores lost, or no trained token at all: zero loss, zero gradients, and every rank gets through."""
    jobs = [
        (replace(case, batch=Batch(lengths=lengths, lost="all")), layout)
        for lengths in ((5, 3), ())
        for layout in BY_WORLD[world][1:2]
        for case in CASES
    ]
    check(request.getfixturevalue(f"ranks{world}"), jobs)
