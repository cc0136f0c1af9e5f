"""Segments of a rollout put together, and a rollout cut short."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nemo_opd.rollout.pieces import continued, shortened
from nemo_opd.types import Author, Finish
from tests.helpers.rollouts import make_rollout

PER_TOKEN = ("response_ids", "sampler_logprobs", "author", "policy_version", "loss_mask")


def test_a_continuation_keeps_what_is_known_of_the_first_tokens() -> None:
    whole = make_rollout(1, 9)
    before = shortened(whole, 4)
    nobody = torch.arange(9) < 4
    after = replace(
        whole,
        sampler_logprobs=whole.sampler_logprobs.masked_fill(nobody, torch.nan),
        policy_version=whole.policy_version.masked_fill(nobody, -1),
        author=whole.author.masked_fill(nobody, int(Author.TEACHER)),
        loss_mask=whole.loss_mask | nobody,
    )
    joined = continued(before, after)
    for name in PER_TOKEN:
        assert torch.equal(getattr(joined, name), getattr(whole, name)), name
    assert joined.finish is Finish.EOS


def test_a_continuation_of_something_else_is_our_own_bug() -> None:
    with pytest.raises(AssertionError):
        continued(make_rollout(1, 4), make_rollout(2, 9))


@pytest.mark.parametrize("length", [0, 3])
def test_shortened(length: int) -> None:
    whole = replace(make_rollout(1, 9, reward=1.0), decode=lambda ids: f"{len(ids)} tokens")
    short = shortened(whole, length)
    for name in PER_TOKEN:
        assert torch.equal(getattr(short, name), getattr(whole, name)[:length]), name
    assert (short.finish, short.text, short.reward) == (Finish.STOPPED, f"{length} tokens", 1.0)
