from __future__ import annotations

import json

import pytest

from nemo_opd.config import VerifyConfig
from nemo_opd.types import Prompt
from nemo_opd.verify.build import build_verifier
from nemo_opd.verify.choice import options

QUESTION = "Which city is on the Seine?\nA) London\nB) Paris\nC) Rome\nD) I do not know"


def prompt(answer: str | None, text: str = QUESTION, field: str | None = None) -> Prompt:
    return Prompt(
        index=0, epoch=0, messages=({"role": "user", "content": text},), token_ids=(1,), answer=answer,
        meta={} if field is None else {"options": field},
    )  # fmt: skip


def reward(response: str, asked: Prompt, marker: str | None = None) -> float | None:
    verifier = build_verifier(VerifyConfig(name="choice", answer_pattern=marker))
    assert verifier is not None
    return verifier(response, asked)


@pytest.mark.parametrize(
    ("line", "right"),
    [
        ("B", True), (" b", True), ("(B)", True), ("B.", True), ("**B**", True), ("\\boxed{B}", True), ("$B$", True),
        ("\\boxed{\\text{B}}", True), ("B) Paris", True), ("(b) Paris", True), ("option B", True),
        ("the answer is (B).", True), ("B\nA", True), ("[B]", True),
        ("A", False), ("A or B", False), ("B or A", False), ("B, A", False), ("BA", False), ("Paris", False),
        ("", False), ("E", False), ("ABCD", False), ("Because", False), ("B A", False), ("(" * 5000, False),
    ],
)  # fmt: skip
def test_after_a_marker_the_line_names_one_letter(line: str, right: bool) -> None:
    assert reward(f"first A, then #{line}", prompt("B"), "#") == float(right)


def test_a_marker_must_be_there_and_its_last_occurrence_counts() -> None:
    assert reward("B", prompt("B"), "#") == 0.0
    assert reward("#A#B", prompt("B"), "#") == 1.0
    assert reward("#B#A", prompt("B"), "#") == 0.0


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"), ("The answer is B.", "B"), ("Not A but (B)", "B"), ("B, since A is wrong, so B", "B"),
        ("I pick B. A good choice.", "B"), ("So B. I am sure.", "B"), ("It must be A", "A"), ("A", "A"),
        ("It is D. I'm sure", "D"), ("C++ and U.S. and Bob: D", "D"), ("**C**", "C"), ("C\nE", "C"),
        ("Paris", None), ("A city on the Seine", None), ("", None), ("b", None), ("E", None), ("ABC", None),
    ],
)  # fmt: skip
def test_without_a_marker_the_last_option_letter_counts(response: str, letter: str | None) -> None:
    for asked in "ABCD":
        assert reward(response, prompt(asked)) == float(asked == letter)


@pytest.mark.parametrize(
    ("text", "field", "letters"),
    [
        (QUESTION, None, "ABCD"),
        ("(a) one\n(b) two", None, "AB"),
        ("A. x\nB. y\nC. z\n\nA. p\nB. q", None, "AB"),
        ("I. Introduction: what is it?", None, "ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
        ("A: he said something", None, "ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
        ("no list", "ABC", "ABC"),
        ("no list", "a, b, c, d, e", "ABCDE"),
        (QUESTION, "XY", "XY"),
        ("no list", json.dumps(["London", "Paris"]), "AB"),
    ],
)
def test_options(text: str, field: str | None, letters: str) -> None:
    assert options(prompt("A", text, field))[0] == letters


def test_a_reference_may_be_the_text_of_an_option() -> None:
    asked = prompt("Paris", "no list", json.dumps(["London", "Paris", "A"]))
    assert [reward(text, asked, "#") for text in ("#B", "#A", "#Paris")] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "asked",
    [
        prompt("E"), prompt("Paris"), prompt("A or B"), prompt(""), prompt("A", field="A1"), prompt("A", field="AA"),
        prompt("A", field="[1, 2]"), prompt("A", field="[]"), prompt("A", field="[" * 3000),
    ],
)  # fmt: skip
def test_a_reference_that_is_no_option_gives_no_reward(asked: Prompt) -> None:
    verifier = build_verifier(VerifyConfig(name="choice"))
    assert verifier is not None
    assert verifier("A", asked) is None
    assert dict(verifier.counts) == {"unreadable_reference": 1}
