"""Messages arrive where the plan sends them, whole and in order."""

from __future__ import annotations

import torch

from nemo_opd.engines.exchange import Message, exchange
from tests.helpers.ranks import RankPool

PLAN = [
    Message(0, 0, 1, 3),
    Message(1, 0, 1, 2),
    Message(2, 1, 0, 4),
    Message(2, 1, 1, 4),
    Message(3, 0, 0, 1),
    Message(1, 0, 0, 2),
]


def payload(number: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.arange(tokens * 2, dtype=torch.float32).view(tokens, 2) + 100 * number
    return values, values.to(torch.int64)[:, :1]


def deliver(rank: int) -> list[int]:
    held = {m.number: payload(m.number, m.tokens) for m in PLAN if m.source == rank}
    empty = (torch.empty(0, 2), torch.empty(0, 1, dtype=torch.int64))
    numbers = []
    for number, (values, ids) in exchange(PLAN, held, empty, torch.device("cpu")):
        expected = payload(number, len(values))
        assert torch.equal(values, expected[0]) and torch.equal(ids, expected[1])
        assert len(values) == next(m.tokens for m in PLAN if m.number == number)
        numbers.append(number)
    return sorted(numbers)


def nothing(rank: int) -> int:
    return len(list(exchange([], {}, (torch.empty(0, 2),), torch.device("cpu"))))


def test_exchange(ranks2: RankPool) -> None:
    assert ranks2.run(deliver) == [[1, 2, 3], [0, 1, 2]]
    assert ranks2.run(nothing) == [0, 0]
