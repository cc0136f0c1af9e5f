"""Every reference answer of GSM8K's test set is accepted, and answers near it are refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.verification import Case, cases, read_problems
from nemo_opd.config import VerifyConfig
from nemo_opd.types import Prompt
from nemo_opd.verify.build import build_verifier

FILE = Path(__file__).parents[4] / "shared" / "data" / "gsm8k_test.jsonl"

pytestmark = pytest.mark.skipif(not FILE.is_file(), reason="GSM8K's test problems are not beside the checkout")


@pytest.fixture(scope="module")
def problems() -> list[Prompt]:
    read = read_problems(FILE)
    assert len(read) == 1319
    return read


def _grade(name: str, problems: list[Prompt], wanted: Iterator[Case]) -> list[Case]:
    """The cases that were graded wrongly."""
    verifier = build_verifier(VerifyConfig(name=name, answer_pattern="#### "))
    assert verifier is not None
    try:
        return [c for c in wanted if verifier(c.response, problems[c.problem]) != float(c.right)]
    finally:
        verifier.close()


def test_integer_accepts_all_and_refuses_every_perturbation(problems: list[Prompt]) -> None:
    every = list(cases(problems))
    assert sum(c.right for c in every) == 2 * 1319
    assert sum(not c.right for c in every) > 5 * 1319
    assert _grade("integer", problems, iter(every)) == []


@pytest.mark.slow
def test_math_accepts_all_and_refuses_perturbations(problems: list[Prompt]) -> None:
    """All right answers, and one perturbation of each problem, each kind in turn (the benchmark runs them all)."""
    wrong: dict[int, list[Case]] = {}
    for case in cases(problems):
        if not case.right:
            wrong.setdefault(case.problem, []).append(case)
    chosen = [c for c in cases(problems) if c.kind == "reference"]
    chosen += [found[n % len(found)] for n, found in wrong.items()]
    assert len({c.kind for c in chosen}) > 5
    assert _grade("math", problems, iter(chosen)) == []
