"""What a served teacher can answer, and that anything else is refused with the need."""

from __future__ import annotations

import pytest
import torch

from nemo_opd.vocab.partial import PartialView

WRITTEN = torch.tensor([3, 1])
IDS = torch.tensor([[4, 2], [0, 1]])
SCORES = torch.tensor([[0.5, 0.2], [0.6, 0.3]]).log()


def served(ranked: bool = True) -> PartialView:
    return PartialView(7, WRITTEN, None, IDS, SCORES, ranked)


def test_scores_of_ids_masses_and_tail():
    view = served()
    assert torch.equal(view.logprob(IDS), SCORES)
    assert torch.equal(view.logprob(IDS.flip(1)), SCORES.flip(1))
    torch.testing.assert_close(view.mass(IDS), torch.tensor([0.7, 0.9]))
    torch.testing.assert_close(view.log_tail(IDS), torch.tensor([0.3, 0.1]).log())
    one = torch.tensor([[True, False], [True, False]])
    torch.testing.assert_close(view.log_tail(IDS, one), torch.tensor([0.5, 0.4]).log())
    assert torch.equal(view.topk(2), IDS)


def test_a_mass_of_one_has_a_finite_tail():
    view = PartialView(7, WRITTEN, None, IDS, torch.tensor([[0.7, 0.3], [0.8, 0.25]]).log())
    assert view.log_tail(IDS).isfinite().all()


def test_sampled_scores_answer_for_the_written_tokens_only():
    view = PartialView(7, WRITTEN, torch.tensor([-1.0, -2.0]))
    assert view.logprob(WRITTEN).tolist() == [-1.0, -2.0]
    with pytest.raises(TypeError, match="log q of the written tokens"):
        view.logprob(IDS)


@pytest.mark.parametrize(
    ("ask", "need"),
    [
        (lambda v: v.entropy(), "FULL"),
        (lambda v: v.logsumexp(), "FULL"),
        (lambda v: v.expectation(lambda q: q), "FULL"),
        (lambda v: v.logprob(torch.tensor([[4, 5], [0, 1]])), "FULL"),
        (lambda v: v.topk(3), "TOP_K"),
        (lambda v: served(ranked=False).topk(2), "TOP_K"),
        (lambda v: PartialView(7, WRITTEN).logprob(IDS), "AT_IDS"),
    ],
)
def test_what_was_not_served_is_refused_by_its_need(ask, need):
    with pytest.raises(TypeError, match=f"Need.{need}"):
        ask(served())
