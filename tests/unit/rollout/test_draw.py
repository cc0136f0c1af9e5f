"""Which prompts a step ends up with when groups whose rewards are all the same are replaced."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_opd.accounts import reward_metrics, token_metrics
from nemo_opd.checkpoint.store import RunState
from nemo_opd.config import GroupRelativeReward, NoReward, SlotConfig
from nemo_opd.loop import drawn_rollouts
from nemo_opd.observe.clock import Clock
from nemo_opd.processes import Processes
from nemo_opd.reliability.stop import StopRequest
from nemo_opd.rollout.ahead import RolloutsAhead
from nemo_opd.types import Prompt, Rollout
from tests.helpers.rollouts import make_prompt, make_rollout


class _Stream:
    """Prompts 0, 1, 2, ..."""

    def __init__(self) -> None:
        self.position = 0

    def take(self, n: int) -> list[Prompt]:
        self.position += n
        return [make_prompt(index) for index in range(self.position - n, self.position)]

    def state(self) -> dict[str, Any]:
        return {"position": self.position}


class _Source:
    """Three responses per prompt; those of every third prompt (0, 3, 6, ...) differ in their reward."""

    def rollouts(self, prompts: Sequence[Prompt], *_: Any) -> Iterator[Rollout]:
        for prompt in prompts:
            for sample in range(3):
                ids = torch.tensor([sample, 5, 5])
                yield replace(make_rollout(prompt.index, 3, sample), response_ids=ids, decode=_text)


def _text(ids: torch.Tensor) -> str:
    return "even" if int(ids[0]) % 2 == 0 else "odd"


def _run(reward: SlotConfig, prompts_per_step: int = 2) -> Any:
    processes = Processes()
    stop = StopRequest(None, "test", processes)
    return SimpleNamespace(
        config=SimpleNamespace(reward=reward, train=SimpleNamespace(prompts_per_step=prompts_per_step)),
        ahead=RolloutsAhead(_Stream(), processes, stop.requested, prompts_per_step, staleness=0, steps=10),
        early=None,
        source=_Source(),
        verifier=lambda text, prompt: float(text == "even") if prompt.index % 3 == 0 else 1.0,
        processes=processes,
        own=Clock(),
        stop=stop,
        decode=_text,
        state=RunState(),
    )


def _prompts(rollouts: Sequence[Rollout]) -> list[int]:
    return sorted({rollout.prompt.index for rollout in rollouts})


@pytest.mark.parametrize("reward", [NoReward(), GroupRelativeReward(equal_groups="drop")])
def test_without_redrawing_a_step_has_its_prompts(reward: SlotConfig) -> None:
    run = _run(reward, prompts_per_step=4)
    drawn = drawn_rollouts(run)
    assert drawn is not None and _prompts(drawn[0]) == [0, 1, 2, 3] and drawn[1] == []
    if isinstance(reward, GroupRelativeReward):
        assert reward_metrics(run.config.reward, run.state, *drawn)["reward/equal_groups"] == 2


def test_equal_groups_are_replaced_by_the_next_prompts() -> None:
    """Of 0, 1 the second says nothing; nor do 2; then 3 does: three rounds."""
    run = _run(GroupRelativeReward(equal_groups="redraw", redraws=5))
    drawn = drawn_rollouts(run)
    assert drawn is not None
    kept, passed_over = drawn
    assert _prompts(kept) == [0, 3] and len(kept) == 6 and _prompts(passed_over) == [1, 2]
    assert run.ahead.position == {"position": 4}, "no prompt more than was needed"
    metrics = reward_metrics(run.config.reward, run.state, kept, passed_over)
    assert metrics["reward/equal_groups"] == metrics["reward/passed_over_groups"] == 2
    assert run.state.counters["passed_over_groups"] == 2
    counts = {"trained": 6.0, "dropped": 0.0}
    tokens = token_metrics(run.state, kept, passed_over, [()] * len(kept), counts, discarded=0)
    assert tokens["tokens/written"] == 4 * 3 * 3, "what was passed over was written too"
    again = drawn_rollouts(run)
    assert again is not None and _prompts(again[0]) == [6, 9], "the stream goes on where the step ended"
    assert reward_metrics(run.config.reward, run.state, *again)["reward/passed_over_groups_total"] == 2 + 4


def test_the_same_again_from_the_same_position() -> None:
    reward = GroupRelativeReward(equal_groups="redraw", redraws=5)
    first, second = (drawn_rollouts(_run(reward, 3)) for _ in range(2))
    assert first is not None and second is not None
    for one, other in zip([*first[0], *first[1]], [*second[0], *second[1]], strict=True):
        assert one.prompt.index == other.prompt.index and torch.equal(one.response_ids, other.response_ids)


def test_redrawing_ends() -> None:
    run = _run(GroupRelativeReward(equal_groups="redraw", redraws=1))
    drawn = drawn_rollouts(run)
    assert drawn is not None and _prompts(drawn[0]) == [0] and _prompts(drawn[1]) == [1, 2]


def test_a_stop_request_ends_it_between_two_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    run = _run(GroupRelativeReward(equal_groups="redraw", redraws=5))
    asked = iter([False, True])
    monkeypatch.setattr(run.stop, "agreed", lambda: next(asked))
    assert drawn_rollouts(run) is None
