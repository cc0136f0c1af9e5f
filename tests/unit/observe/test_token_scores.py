"""What was measured at single tokens finds its way to the rollout that they belong to."""

from __future__ import annotations

from dataclasses import replace

import torch

from nemo_opd.observe.token_scores import flatten, shown_rollouts, unflatten
from nemo_opd.packing import pack
from nemo_opd.types import Rollout
from tests.helpers.rollouts import make_rollout


def _name(rollout: Rollout) -> torch.Tensor:
    """A number for each response token that no other token has."""
    return 1000.0 * rollout.prompt.index + torch.arange(float(len(rollout.response_ids)))


def test_scores_come_back_to_their_rollouts():
    rollouts = [make_rollout(i, length) for i, length in enumerate((5, 0, 9, 3, 12))]
    rows, measured = [], []
    for members in ((0, 2, 1), (3, 4)):  # of two replicas
        for row in pack([rollouts[i] for i in members], {}, members, [0.0] * 3, capacity=18):
            owners = [rollouts[row.keys[s]] for s in row.tokens.sequence.tolist()]
            values = [_name(owner)[t] for owner, t in zip(owners, row.tokens.offset.tolist(), strict=True)]
            rows.append(row)
            measured.append({"kl": torch.tensor(values)})
    parts = [flatten([row], [scores], {0, 2, 4}) for row, scores in zip(rows, measured, strict=True)]
    assert len(rows) > 2 and any(len(row.keys) > 1 for row in rows)
    found = unflatten(parts, {i: len(r.response_ids) for i, r in enumerate(rollouts)})
    assert set(found) == {0, 2, 4}
    for key, scores in found.items():
        assert set(scores) == {"kl"}
        expected = torch.where(rollouts[key].loss_mask, _name(rollouts[key]), torch.nan)
        torch.testing.assert_close(scores["kl"], expected, equal_nan=True)


def test_the_verifiers_advantage_comes_along():
    rollout = replace(make_rollout(0, 4), loss_mask=torch.ones(4, dtype=torch.bool))
    (row,) = pack([rollout], {}, [0], [0.5], capacity=24)
    assert unflatten([flatten([row], [{}], [0])], {0: 4})[0]["advantage"].tolist() == [0.5] * 4


def test_nothing_is_a_message_too():
    assert flatten([], [], [1]).tolist() == []
    assert unflatten([torch.zeros(0, dtype=torch.float64)], {}) == {}


def test_every_prompt_is_shown_before_any_is_shown_twice():
    rollouts = [make_rollout(i, 2, sample=s) for i in range(3) for s in (0, 1)]
    assert [(rollouts[i].prompt.index, rollouts[i].sample) for i in shown_rollouts(rollouts, 4)] == [
        (0, 0), (1, 0), (2, 0), (0, 1)
    ]  # fmt: skip
    assert shown_rollouts(rollouts, 0) == []
