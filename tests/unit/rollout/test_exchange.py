"""Rollouts arrive on every rank as they were written, in an order that does not depend on who wrote them."""

from __future__ import annotations

from dataclasses import fields, replace

import torch

from nemo_opd.processes import Processes
from nemo_opd.rollout.exchange import gather_rollouts
from nemo_opd.types import BestIds, Rollout
from tests.helpers.ranks import RankPool
from tests.helpers.rollouts import make_rollout


def _everyone() -> list[Rollout]:
    return [
        make_rollout(i, length=3 + i + s, sample=s, reward=None if i == 2 else 0.1 * i)
        for i in range(4)
        for s in (0, 1)
    ]


def _joined(ids: torch.Tensor) -> str:
    return "-".join(map(str, ids.tolist()))


def _gather(rank: int) -> list[Rollout]:
    everyone = _everyone()
    prompts = [everyone[2 * i].prompt for i in range(4)]
    mine = [everyone[i] for i in ((7, 0, 3), (6, 2, 1, 4, 5))[rank]]
    return gather_rollouts(Processes.current(), mine, prompts, _joined)


def test_all_fields_survive_in_canonical_order(ranks2: RankPool):
    for answer in ranks2.run(_gather):
        assert len(answer) == 8
        for got, sent in zip(answer, _everyone(), strict=True):
            for field in fields(Rollout):
                a, b = getattr(got, field.name), getattr(sent, field.name)
                if isinstance(b, torch.Tensor):
                    assert a.dtype == b.dtype, field.name
                    assert torch.equal(a, b), field.name
                elif field.name == "decode":
                    assert got.text == _joined(sent.response_ids)
                else:
                    assert a == b, field.name


def test_texts_are_made_where_they_are_read_alone() -> None:
    asked: list[int] = []

    def decode(ids: torch.Tensor) -> str:
        asked.append(len(ids))
        return _joined(ids)

    everyone = _everyone()
    gathered = gather_rollouts(Processes(), everyone, [rollout.prompt for rollout in everyone[::2]], decode)
    assert len(gathered) == 8 and not asked
    assert gathered[5].text == _joined(everyone[5].response_ids) and asked == [len(everyone[5].response_ids)]


def test_one_process_without_rollouts():
    assert gather_rollouts(Processes(), [], [], str) == []


def _with_best(rank: int) -> list[bool]:
    """Which of the gathered rollouts hold their best ids, on this rank; those that do hold their own."""
    mine = [replace(r, best=_best(r)) for r in _everyone() if (r.prompt.index + r.sample) % 2 == rank]
    prompts = [rollout.prompt for rollout in _everyone()[::2]]
    gathered = gather_rollouts(Processes.current(), mine, prompts, lambda ids: "")
    for rollout in gathered:
        if rollout.best is not None:
            assert torch.equal(rollout.best.ids, _best(rollout).ids)
    return [rollout.best is not None for rollout in gathered]


def _best(rollout: Rollout) -> BestIds:
    ids = rollout.response_ids[:, None].int()
    return BestIds(ids, torch.zeros(ids.shape))


def test_what_the_writer_said_stays_with_it(ranks2: RankPool):
    first, second = ranks2.run(_with_best)
    assert first == [(r.prompt.index + r.sample) % 2 == 0 for r in _everyone()]
    assert second == [not held for held in first]
