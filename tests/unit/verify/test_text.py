from __future__ import annotations

import pytest

from nemo_opd.config import VerifyConfig
from nemo_opd.errors import ConfigError
from nemo_opd.types import Prompt
from nemo_opd.verify.base import GraderUnavailableError, GradingTimeoutError, Verifier
from nemo_opd.verify.build import build_verifier
from nemo_opd.verify.math import MathVerifier
from nemo_opd.verify.text import ExactVerifier, IntegerVerifier


def prompt(answer: str | None) -> Prompt:
    return Prompt(index=3, epoch=0, messages=(), token_ids=(1,), answer=answer)


def _reward(name: str, marker: str | None, response: str, answer: str | None) -> float | None:
    verifier = build_verifier(VerifyConfig(name=name, answer_pattern=marker))
    assert verifier is not None
    return verifier(response, prompt(answer))


@pytest.mark.parametrize(
    ("marker", "response", "answer", "reward"),
    [
        (None, " Paris\n", "Paris", 1),
        (None, "paris", "Paris", 0),
        (None, "It is Paris", "Paris", 0),
        ("#", "I think#Paris ", "Paris", 1),
        ("#", "Paris", "Paris", 0),
        ("#", "#Rome#Paris", "Paris", 1),
        ("#", "#Paris#Rome", "Paris", 0),
        ("#", "#Paris", "reasons#Paris", 1),
        ("#", "#", "Paris", 0),
    ],
)
def test_exact(marker: str | None, response: str, answer: str, reward: float) -> None:
    assert _reward("exact", marker, response, answer) == reward


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("so #### 1000", 1),
        ("so #### 1,000", 1),
        ("so #### $1,000.", 1),
        ("so #### 1000.00", 1),
        ("so #### +01000\nand more text 7", 1),
        ("#### 7 #### 1000", 1),
        ("#### 1000 #### 7", 0),
        ("#### 1000.5", 0),
        ("#### 10000", 0),
        ("#### 100", 0),
        ("#### -1000", 0),
        ("#### 10,00", 0),
        ("#### 1000 or 7", 0),
        ("#### 7 1000", 0),
        ("#### 1000%", 0),
        ("#### 1e3", 0),
        ("#### ١٠٠٠", 0),
        ("#### ", 0),
        ("1000", 0),
        ("", 0),
        ("#### " + "9" * 100_000, 0),
    ],
)
def test_integer_after_a_marker(response: str, reward: float) -> None:
    assert _reward("integer", "#### ", response, "solution text 3 #### 1,000") == reward


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        ("12-4=8", "8", 1),
        ("the answer is 8.", "8", 1),
        ("first 8 then 9", "8", 0),
        ("it is 12-8", "8", 1),
        ("it is -8", "-8", 1),
        ("it is −8", "-8", 1),
        ("it is 12-8", "-8", 0),
        ("8.5", "8", 0),
        ("8 and 2.5", "8", 1),
        ("x8", "8", 0),
        ("a1,234,567b 1,234,567", "1234567", 1),
        ("none", "8", 0),
        ("-0", "0", 1),
    ],
)
def test_last_integer_without_a_marker(response: str, answer: str, reward: float) -> None:
    assert _reward("integer", None, response, answer) == reward


def test_missing_and_unreadable_references_are_none_and_counted() -> None:
    verifier = IntegerVerifier(VerifyConfig(name="integer"))
    assert verifier("8", prompt(None)) is None
    assert verifier("8", prompt("eight")) is None
    assert verifier("8", prompt("8")) == 1.0
    assert dict(verifier.counts) == {"no_reference": 1, "unreadable_reference": 1, "right": 1}


@pytest.mark.parametrize(
    ("error", "outcome", "reward"),
    [
        (GradingTimeoutError(), "timeout", 0.0),
        (GraderUnavailableError(), "unavailable", None),
        (RecursionError(), "error", 0.0),
        (MemoryError(), "error", 0.0),
    ],
)
def test_no_error_reaches_the_loop(error: Exception, outcome: str, reward: float | None) -> None:
    class Failing(Verifier):
        def grade(self, answer: str, reference: str) -> float:
            raise error

    verifier = Failing(VerifyConfig())
    assert verifier("x", prompt("x")) == reward
    assert dict(verifier.counts) == {outcome: 1}


def test_names_pick_verifiers_and_bad_settings_are_refused() -> None:
    assert build_verifier(VerifyConfig()) is None
    kinds = {"exact": ExactVerifier, "integer": IntegerVerifier, "math": MathVerifier}
    assert {name: type(build_verifier(VerifyConfig(name=name))) for name in kinds} == kinds
    for bad in ({"name": "sympy"}, {"time_limit": 0.0}, {"answer_pattern": ""}):
        with pytest.raises(ConfigError, match=r"verify\."):
            build_verifier(VerifyConfig(**bad))
