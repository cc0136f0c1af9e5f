"""Every registered loss, spread over ranks in every way, against a dense reference: value and gradient in float64."""

from __future__ import annotations

import pytest

from nemo_opd.config import CrossEntropyLoss, PolicyGradientLoss, ReverseKLLoss
from tests.helpers.loss_reference import reference_answer
from tests.helpers.losses import Case, Layout, assemble, solve

CASES = [
    Case(ReverseKLLoss()),
    Case(PolicyGradientLoss()),
    Case(PolicyGradientLoss(clip_ratio=0.2)),
    Case(CrossEntropyLoss()),
]
LAYOUTS = [Layout(tp=t, chunk=c, pad_to=t - 1) for t in (1, 2, 4) for c in (1, 7, 1000)]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_loss_and_gradient_equal_the_dense_reference(world, request):
    pool = request.getfixturevalue(f"ranks{world}")
    jobs = [(case, layout) for layout in LAYOUTS if layout.tp * layout.dp * layout.cp == world for case in CASES]
    shares = pool.run(solve, jobs)
    for i, (case, layout) in enumerate(jobs):
        got, expected = assemble(case, layout, [s[i] for s in shares]), reference_answer(case)
        error = max(
            abs(got.loss - expected.loss),
            float((got.dhidden - expected.dhidden).abs().max()),
            float((got.dweight - expected.dweight).abs().max()),
        )
        assert error <= 1e-10, (case, layout, error)
