"""Ranks that compute the same, and ranks that do not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nemo_opd.doctor import ranks
from nemo_opd.doctor.finding import Finding, Verdict
from nemo_opd.doctor.ranks import Computed, judged, rank_findings
from nemo_opd.processes import Processes
from tests.helpers.ranks import RankPool

SAME = Computed("a", True, 1.0, 0.5)
CPU = torch.device("cpu")


def verdicts(rows: list[Finding]) -> dict[str, str]:
    return {row.name.removeprefix("ranks: "): row.verdict.value for row in rows if row.verdict is not Verdict.OK}


def test_ranks_that_agree() -> None:
    rows = judged([SAME] * 4, 64 << 20)
    assert verdicts(rows) == {} and len(rows) == 5
    moved = next(row for row in rows if row.name == "ranks: all-reduce of 64 MiB, GB/s")
    assert moved.found == pytest.approx(2 * 3 / 4 * (64 << 20) / 0.5 / 1e9)


@pytest.mark.parametrize(
    ("other", "wrong"),
    [
        (replace(SAME, digest="b"), {"the same work on each": "warn"}),
        (replace(SAME, repeated=False), {"the same work twice": "fail"}),
        (replace(SAME, product=2.1), {"seconds of a product, slowest over median": "warn"}),
        (replace(SAME, reduced=1.1), {"seconds of an all-reduce, slowest over median": "warn"}),
    ],
)
@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_that_is_another(other: Computed, wrong: dict[str, str], size: int) -> None:
    rows = judged([SAME] * (size - 1) + [other], 64 << 20)
    assert verdicts(rows) == wrong
    said = " ".join(f"{row.found} {row.way_out}" for row in rows if row.verdict is not Verdict.OK)
    assert f"rank {size - 1}" in said


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_rank(dtype: torch.dtype) -> None:
    (row,) = rank_findings(Processes(), dtype, CPU)
    assert row.verdict is Verdict.OK and row.found == "the same on 1 rank(s)"


def together(rank: int, draws_otherwise: bool) -> list[Finding]:
    seed = ranks.SEED
    ranks.SEED += rank if draws_otherwise else 0
    try:
        return rank_findings(Processes.current(), torch.bfloat16, CPU)
    finally:
        ranks.SEED = seed


@pytest.mark.parametrize("draws_otherwise", [False, True])
def test_real_ranks(ranks2: RankPool, draws_otherwise: bool) -> None:
    first, second = ranks2.run(together, draws_otherwise)
    assert second == [] and len(first) == 5
    found = {row.name: row for row in first}
    assert found["ranks: the same work twice"].verdict is Verdict.OK
    equal = found["ranks: the same work on each"]
    assert equal.verdict is (Verdict.WARN if draws_otherwise else Verdict.OK)
    assert not draws_otherwise or equal.found == "another result on rank 1"
    assert float(found["ranks: all-reduce of 4 MiB, GB/s"].found or 0) > 0
