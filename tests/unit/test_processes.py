"""Small collectives over real gloo ranks, and the deterministic split of work."""

from __future__ import annotations

import torch

from nemo_opd.processes import Processes, balanced
from tests.helpers.ranks import RankPool


def test_balanced_covers_all_and_is_even():
    lengths = [7, 1, 9, 4, 4, 12, 3, 3]
    parts = balanced(lengths, 3)
    assert sorted(i for part in parts for i in part) == list(range(8))
    loads = [sum(lengths[i] for i in part) for part in parts]
    assert max(loads) - min(loads) <= 3
    assert balanced([], 2) == [[], []]


def test_replicas_get_the_same_number_of_tokens():
    """Lengths as of responses, a few of them very long: 8 replicas differ by less than a hundredth."""
    draws = torch.Generator().manual_seed(0)
    lengths = (500 * torch.randn(256, generator=draws).exp()).long().clamp(50, 8192).tolist()
    assert max(lengths) > 10 * sorted(lengths)[128]
    loads = [sum(lengths[i] for i in part) for part in balanced(lengths, 8)]
    assert max(loads) - min(loads) < 0.01 * min(loads)
    by_number = [sum(lengths[part::8]) for part in range(8)]
    assert max(by_number) - min(by_number) > 20 * (max(loads) - min(loads)), "as many responses each is not as good"


def test_shares_cover_all_items_once():
    for count in (0, 1, 5, 8):
        shares = [Processes(rank, 3).share(count) for rank in range(3)]
        assert [i for share in shares for i in share] == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def _talk(rank: int) -> tuple:
    processes = Processes.current()
    return (
        processes.any(rank == 1),
        processes.any(False),
        processes.sum({"a": 1.5 + rank, "b": 2.0}),
        [part.tolist() for part in processes.gather(torch.arange(rank * 3))],
        processes.broadcast_text("größer" if rank == 0 else ""),
    )


def test_ranks_agree(ranks2: RankPool):
    expected = (True, False, {"a": 4.0, "b": 4.0}, [[], [0, 1, 2]], "größer")
    assert ranks2.run(_talk) == [expected, expected]
