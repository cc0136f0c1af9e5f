from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path

import pytest

from nemo_opd.errors import ConfigError
from nemo_opd.tasks.arithmetic import MARKER, ArithmeticTask, Problem, records, write


def _independent_answer(prompt: str) -> int:
    """Usual order of operations, written without the generator's code."""
    total = 0
    for sign, product in re.findall(r"([+-]?)(\d+(?:\*\d+)*)", prompt.rstrip("=")):
        value = 1
        for factor in product.split("*"):
            value *= int(factor)
        total += -value if sign == "-" else value
    return total


TASKS = [
    ArithmeticTask(),
    ArithmeticTask("+", 1, 2),
    ArithmeticTask("+-", 2, 3),
    ArithmeticTask("+-*", 2, 4),
    ArithmeticTask("*", 3, 2),
]


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_answers_are_right_and_responses_end_with_them(task: ArithmeticTask) -> None:
    for record in records(task, 60, seed=3):
        assert int(record["answer"]) == _independent_answer(record["prompt"])
        steps, marker, final = record["response"].rpartition(MARKER)
        assert (marker, final) == (MARKER, record["answer"])
        for step in steps.split(","):
            left, right = step.split("=")
            assert _independent_answer(left) == int(right) >= 0
        assert len(steps.split(",")) == task.terms - 1


def test_operands_have_the_digits_asked_for() -> None:
    operands = {n for r in records(ArithmeticTask("+-", 2, 3), 500, seed=0) for n in re.findall(r"\d+", r["prompt"])}
    assert {len(n) for n in operands} == {2}
    assert {"10", "99"} <= operands


def test_problems_are_distinct_and_the_sides_disjoint_whatever_the_seed() -> None:
    task = ArithmeticTask(terms=3)
    train = [{r["prompt"] for r in records(task, 1500, seed, held_out=False)} for seed in range(3)]
    held = [{r["prompt"] for r in records(task, 150, seed, held_out=True)} for seed in range(3)]
    assert all(len(s) == 1500 for s in train) and all(len(s) == 150 for s in held)
    assert not set().union(*train) & set().union(*held)


def test_the_side_is_a_function_of_the_text_alone() -> None:
    for problem in map(ArithmeticTask().draw, itertools.repeat(random.Random(0), 200)):
        assert problem.held_out == Problem(problem.first, problem.steps).held_out
    share = sum(ArithmeticTask().draw(random.Random(i)).held_out for i in range(4000)) / 4000
    assert 0.10 < share < 0.15  # 32 of 256


def test_the_same_arguments_write_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, ArithmeticTask(), train=50, held_out=20, noise=0.3, seed=7)
    write(tmp_path / "c", ArithmeticTask(), train=50, held_out=20, noise=0.3, seed=8)
    for file in ("train.jsonl", "heldout.jsonl"):
        a, b, c = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert a == b != c
    assert len((tmp_path / "a" / "train.jsonl").read_text().splitlines()) == 50
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"train.jsonl", "heldout.jsonl"}


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_noise_is_one_wrong_step_and_the_answer_stays_true(task: ArithmeticTask) -> None:
    for record in records(task, 60, seed=1, noise=1.0):
        assert int(record["answer"]) == _independent_answer(record["prompt"])
        wrong = 0
        for step in record["response"].rpartition(MARKER)[0].split(","):
            left, right = step.split("=")
            wrong += _independent_answer(left) != int(right)
            assert int(right) >= 0
        assert wrong == 1
        assert record["response"].rpartition(MARKER)[2] != record["answer"]


def test_noise_share_and_same_problems_with_and_without() -> None:
    clean = list(records(ArithmeticTask(), 1000, seed=5))
    noisy = list(records(ArithmeticTask(), 1000, seed=5, noise=0.25))
    assert [r["prompt"] for r in clean] == [r["prompt"] for r in noisy]
    changed = sum(a["response"] != b["response"] for a, b in zip(clean, noisy, strict=True))
    assert 200 <= changed <= 300


def test_the_held_out_file_has_no_noise(tmp_path: Path) -> None:
    write(tmp_path, ArithmeticTask(), train=10, held_out=40, noise=1.0, seed=0)
    for line in (tmp_path / "heldout.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert record["response"].endswith(MARKER + record["answer"])


@pytest.mark.parametrize(
    "make",
    [
        lambda: ArithmeticTask("-"),
        lambda: ArithmeticTask("/"),
        lambda: ArithmeticTask(""),
        lambda: ArithmeticTask("*", terms=3),
        lambda: ArithmeticTask(digits=0),
        lambda: ArithmeticTask(terms=1),
        lambda: list(records(ArithmeticTask(), 1, 0, noise=1.5)),
        lambda: list(records(ArithmeticTask("+", 1, 2), 101, 0)),
    ],
)
def test_impossible_settings_are_refused(make) -> None:
    with pytest.raises(ConfigError):
        make()


def test_running_out_of_problems_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="more of them to exist"):
        write(tmp_path, ArithmeticTask("+", 1, 2), train=1000, held_out=5, noise=0, seed=0)
    assert not (tmp_path / "train.jsonl").exists()
