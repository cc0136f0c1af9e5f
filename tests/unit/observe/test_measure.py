"""What a step's rollouts say by themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nemo_opd.observe.measure import repeated_3grams, rollout_metrics, staleness_metrics
from nemo_opd.types import Finish
from tests.helpers.rollouts import make_rollout


def test_lengths_endings_and_rewards_of_a_step():
    rollouts = [make_rollout(i, length, reward=float(i == 0)) for i, length in enumerate((2, 4, 6, 40))]
    rollouts[3] = replace(rollouts[3], finish=Finish.LENGTH)
    metrics = rollout_metrics(rollouts)
    assert metrics["reward/mean"] == 0.25
    assert [metrics[f"response/length{end}"] for end in ("", "_p50", "_p95", "_max")] == pytest.approx(
        [13.0, 5.0, 34.9, 40.0]
    )
    assert (metrics["response/eos_share"], metrics["response/truncated_share"]) == (0.75, 0.25)
    assert "reward/mean" not in rollout_metrics([make_rollout(0, 2)])
    assert rollout_metrics([]) == {}


def naive(responses: list[list[int]]) -> float:
    total = distinct = 0
    for ids in responses:
        grams = [tuple(ids[i : i + 3]) for i in range(len(ids) - 2)]
        total, distinct = total + len(grams), distinct + len(set(grams))
    return 1 - distinct / total


@pytest.mark.parametrize("vocab", [3, 40, 200_000])
def test_repeated_3grams_are_those_that_a_set_finds(vocab):
    generator = torch.Generator().manual_seed(vocab)
    lengths = (0, 1, 2, 3, 50, 200, 7)
    responses = [torch.randint(0, vocab, (n,), generator=generator) for n in lengths]
    responses += [responses[5], torch.tensor([9, 9, 9, 9, 9, 9])]  # the same text twice is no repetition
    expected = naive([r.tolist() for r in responses])
    assert repeated_3grams(responses) == pytest.approx(expected, abs=1e-12)
    assert expected > 0


@pytest.mark.parametrize(("ids", "share"), [([1, 2, 3, 4, 5], 0.0), ([7] * 12, 0.9), ([1, 2, 3] * 4, 0.7)])
def test_a_loop_is_seen(ids, share):
    assert repeated_3grams([torch.tensor(ids)]) == pytest.approx(share)


def test_responses_too_short_for_a_3gram_have_no_share():
    assert repeated_3grams([]) is None
    assert repeated_3grams([torch.tensor([1, 2]), torch.tensor([3])]) is None
    assert "response/repeated_3grams" not in rollout_metrics([make_rollout(0, 2)])


def test_staleness_is_that_of_trained_tokens_which_a_policy_of_ours_wrote() -> None:
    versions, mask = torch.tensor([-1, 3, 4, 4, 5, 5]), torch.tensor([True, True, True, False, True, True])
    mixed = replace(make_rollout(0, 6), policy_version=versions, loss_mask=mask)
    given = replace(make_rollout(1, 3), policy_version=torch.full((3,), -1))
    found = staleness_metrics([mixed, given], version=5, oldest=2)
    expected = {"staleness_mean": 0.75, "staleness_0": 0.5, "staleness_1": 0.25, "staleness_2": 0.25}
    assert found == {f"rollout/{name}": value for name, value in expected.items()}
    assert staleness_metrics([replace(mixed, policy_version=torch.full((6,), 5))], 5, oldest=0) == {}
    assert staleness_metrics([], 5, 1) == {f"rollout/staleness_{name}": 0.0 for name in ("mean", 0, 1)}
