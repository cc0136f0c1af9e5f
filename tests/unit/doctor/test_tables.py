"""Numbers, bounds and the table, on values made by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch

from nemo_opd.doctor.bounds import DEFAULTS, bounds_for, parse_bounds
from nemo_opd.doctor.compare import difference, greedy, same_weights
from nemo_opd.doctor.finding import Finding, Verdict, as_json, at_least, at_most, failed, table
from nemo_opd.errors import ConfigError

EXACT = DEFAULTS["float32"]


def verdicts(findings: list[Finding]) -> dict[str, str]:
    return {one.name.partition(": ")[2]: one.verdict.value for one in findings}


def test_differences_of_two_engines() -> None:
    generator = torch.Generator().manual_seed(0)
    theirs = [-torch.rand(n, generator=generator, dtype=torch.float64) for n in (20, 70)]
    ours = [theirs[0] + 0.5, theirs[1].clone()]
    ours[1][3] = math.nan
    found = difference(ours, theirs)
    assert (found.tokens, found.missing) == (89, 1)
    assert found.mean == pytest.approx(20 * 0.5 / 89) and found.largest == pytest.approx(0.5)
    assert found.kl == pytest.approx(20 * (math.exp(0.5) - 1.5) / 89), "the formula of k3"
    assert found.outside == pytest.approx(20 / 89)
    first, second, third = found.ranges
    assert first == (0, 16, pytest.approx(16 * 0.5 / 31)) and second == (16, 64, pytest.approx(4 * 0.5 / 52))
    assert third == (64, 256, 0.0) and found.worst_range == first[2]


def test_k3_is_the_kl_of_tokens_drawn_from_the_second() -> None:
    p, m = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.2, 0.6]).double()
    counts = (m * 1000).round().long()
    tokens = torch.repeat_interleave(torch.arange(3), counts)
    found = difference([p.log()[tokens]], [m.log()[tokens]])
    assert found.kl == pytest.approx(float((m * (m / p).log()).sum()))


def test_equal_numbers_pass_and_others_do_not() -> None:
    theirs = [torch.full((100,), -1.0)]
    assert set(verdicts(same_weights("x", difference(theirs, theirs), EXACT, "mend it")).values()) == {"ok"}
    off = same_weights("x", difference([theirs[0] + 0.3], theirs), EXACT, "mend it")
    assert verdicts(off) == {
        "tokens compared": "ok",
        "mean |difference| of log p": "fail",
        "largest |difference|": "warn",
        "KL": "fail",
        "ratios outside [0.8, 1.25]": "fail",
        "by position": "ok",  # the mean says it already
    }
    assert all(one.way_out == "mend it" for one in off if one.verdict is not Verdict.OK)


def test_an_error_that_grows_with_the_position_is_seen_where_the_mean_hides_it() -> None:
    theirs = [torch.full((64,), -1.0)] * 50 + [torch.full((300,), -1.0)]
    ours = [one.clone() for one in theirs]
    ours[-1][256:] += 2e-3
    found = verdicts(same_weights("x", difference(ours, theirs), EXACT, ""))
    assert found["mean |difference| of log p"] == "ok" and found["by position"] == "warn"


def test_a_missing_or_infinite_number_never_passes() -> None:
    nan, nothing = torch.full((4,), math.nan), difference([], [])
    for found in (difference([nan], [torch.zeros(4)]), nothing):
        rows = verdicts(same_weights("x", found, EXACT, ""))
        assert rows["tokens compared"] == rows["KL"] == rows["mean |difference| of log p"] == "fail"
    rows = verdicts(same_weights("x", difference([torch.full((4,), -math.inf)], [torch.zeros(4)]), EXACT, ""))
    assert rows["mean |difference| of log p"] == "fail"


def test_greedy_agreement() -> None:
    written = [torch.tensor([1, 2, 3]), torch.tensor([4])]
    assert greedy("x", [one.double() for one in written], written, EXACT, "").found == 1.0
    lost = greedy("x", [torch.tensor([1, 2, 9.0]), torch.tensor([math.nan])], written, EXACT, "mend it")
    assert (lost.found, lost.verdict, lost.way_out) == (0.5, Verdict.FAIL, "mend it")
    assert greedy("x", [], [], EXACT, "").verdict is Verdict.FAIL


def test_bounds_are_the_coarser_dtypes_and_can_be_replaced() -> None:
    assert bounds_for(["float32", "float64"], {}) == EXACT
    assert bounds_for(["float32", "bfloat16"], {}) == DEFAULTS["bfloat16"]
    assert bounds_for(["float32"], parse_bounds(["kl=0.5", "greedy_agreement=0"])).kl == 0.5
    for word in ("kl", "kl=much", "kl=-1", "kl=nan", "mean=1"):
        with pytest.raises(ConfigError, match=r"--bound: got .* NAME one of mean_difference, largest"):
            parse_bounds([word])


def test_the_table_and_json() -> None:
    findings = [
        Finding("a: one", Verdict.OK, "fine"),
        at_most("a: two", 0.25, 0.1, "lower it"),
        at_most("a: three", math.nan, 1, "find it", above=Verdict.WARN),
        at_least("a: four", 2.0, 1, "raise it"),
    ]
    assert failed(findings) and not failed(findings[2:])
    lines = table(findings).splitlines()
    assert (
        lines[2].split() == ["fail", "a:", "two", "0.25", "at", "most", "0.1"]
        and lines[3].split("-> ")[1] == "lower it"
    )
    assert lines[-1] == "2 ok, 1 warn, 1 fail"
    document = json.loads(as_json(findings))
    assert document["failed"] is True and document["findings"][2]["found"] == "nan"
    assert [Finding.from_json(one.to_json()) for one in findings[:2]] == findings[:2]


def test_between_good_and_bad_lies_a_warning() -> None:
    found = [at_most("x", value, 0.3, "mend it", better=0.1) for value in (0.1, 0.2, 0.4, math.nan)]
    assert [one.verdict.value for one in found] == ["ok", "warn", "fail", "fail"]
    assert found[0].bound == "at most 0.3, better 0.1" and found[1].way_out == "mend it" and not found[0].way_out
