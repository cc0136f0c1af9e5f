"""Integer arithmetic with written-out steps: a task that a model of a million parameters learns in a minute or two.

A problem is a chain of operations, a response writes each running total and ends with the answer after a marker:

    prompt    "7+5-3+8="
    response  "7+5=12,12-3=9,9+8=17#17"
    answer    "17"

Because every step is written, a model can be right at the start and wrong later, which is what on-policy distillation
is about: the teacher then scores prefixes that no data set contains.

Train and held-out problems are disjoint by construction: a hash of the problem's text alone says on which side it
falls, whatever the seed. So a held-out problem cannot appear in any training file of this generator.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nemo_opd.errors import ConfigError
from nemo_opd.tasks.records import distinct, is_held_out, write_lines

MARKER = "#"
"""Stands before the final answer (`verify.answer_pattern`)."""


@dataclass(frozen=True)
class Problem:
    """A chain ``first op operand op operand ...``, evaluated from left to right.

    Example: ``Problem(7, (("+", 5), ("-", 3)))`` is "7+5-3=" with running totals 12 and 9.
    """

    first: int
    steps: tuple[tuple[str, int], ...]

    @property
    def prompt(self) -> str:
        return str(self.first) + "".join(f"{op}{operand}" for op, operand in self.steps) + "="

    @property
    def totals(self) -> tuple[int, ...]:
        """The running total after each step; the last one is the answer."""
        totals, total = [], self.first
        for op, operand in self.steps:
            total = _apply(op, total, operand)
            totals.append(total)
        return tuple(totals)

    @property
    def answer(self) -> str:
        return str(self.totals[-1])

    @property
    def held_out(self) -> bool:
        """On which side the problem falls: a function of its text alone."""
        return is_held_out(self.prompt)

    def response(self, wrong_step: int | None = None, error: int = 0) -> str:
        """The written-out steps and the answer.

        Args:
            wrong_step: a step (from 0) whose total is off by `error`. The later steps go on from the wrong total, so
                the written answer is wrong as well.
        """
        written, total = [], self.first
        for number, (op, operand) in enumerate(self.steps):
            after = _apply(op, total, operand) + (error if number == wrong_step else 0)
            written.append(f"{total}{op}{operand}={after}")
            total = after
        return ",".join(written) + MARKER + str(total)


@dataclass(frozen=True)
class ArithmeticTask:
    """Which problems there are.

    Args:
        operations: out of "+", "-" and "*". Totals never fall below 0. A product can only be the first step, so that
            reading from left to right is the usual order of operations.
        digits: of every operand (no leading zeros; one digit includes 0).
        terms: operands of a problem, at least 2.

    Raises:
        ConfigError: no such operation, or sizes below 1 digit and 2 terms.
    """

    operations: str = "+-"
    digits: int = 1
    terms: int = 5

    def __post_init__(self) -> None:
        if not self.operations or set(self.operations) - set("+-*") or self.operations == "-":
            raise ConfigError(
                "operations", repr(self.operations), "some of '+', '-' and '*', and '-' not alone",
                "add '+', for a chain of subtractions would fall below zero",
            )  # fmt: skip
        if self.operations == "*" and self.terms > 2:
            raise ConfigError(
                "operations", f"'*' alone with {self.terms} terms", "'+' as well, or 2 terms",
                "add '+', for only the first step may be a product",
            )  # fmt: skip
        if self.digits < 1 or self.terms < 2:
            raise ConfigError(
                "digits and terms", f"{self.digits} and {self.terms}", "at least 1 and 2", "raise the smaller one"
            )

    def draw(self, random_: random.Random) -> Problem:
        """A random problem."""
        first = total = self._operand(random_)
        steps: list[tuple[str, int]] = []
        for number in range(self.terms - 1):
            operand = self._operand(random_)
            allowed = [op for op in self.operations if op == "+" or (op == "-" and operand <= total)]
            allowed += ["*"] if "*" in self.operations and number == 0 else []
            op = random_.choice(allowed or ["+"])
            total = _apply(op, total, operand)
            steps.append((op, operand))
        return Problem(first, tuple(steps))

    def problems(self, random_: random.Random, held_out: bool) -> Iterator[Problem]:
        """Distinct problems of one side, endlessly.

        Raises:
            ConfigError: no new problem was found in many draws: there are too few.
        """
        return distinct(lambda: self.draw(random_), held_out, lambda problem: problem.prompt)

    def _operand(self, random_: random.Random) -> int:
        return random_.randint(0 if self.digits == 1 else 10 ** (self.digits - 1), 10**self.digits - 1)


def _apply(op: str, total: int, operand: int) -> int:
    return total + operand if op == "+" else total - operand if op == "-" else total * operand


def records(
    task: ArithmeticTask, count: int, seed: int, held_out: bool = False, noise: float = 0.0
) -> Iterator[dict[str, str]]:
    """`count` records with `prompt`, `answer` (always the true one) and `response`, the same for the same arguments.

    Args:
        seed: of the drawing; train and held-out problems are disjoint for any seeds.
        noise: share of the responses with one wrong step, in [0, 1]. The wrong total is off by 1, 2 or 10 and not
            negative, so the response stays well formed.

    Raises:
        ConfigError: noise outside [0, 1], or fewer than `count` problems exist.
    """
    if not 0 <= noise <= 1:
        raise ConfigError("noise", noise, "a share in [0, 1]", "0 writes no wrong step")
    drawing, faults = random.Random(f"problems {seed}"), random.Random(f"noise {seed}")
    for problem, _ in zip(task.problems(drawing, held_out), range(count), strict=False):
        response = _noisy(problem, faults) if faults.random() < noise else problem.response()
        yield {"prompt": problem.prompt, "answer": problem.answer, "response": response}


def _noisy(problem: Problem, random_: random.Random) -> str:
    """A response with one wrong step, from which all later totals stay at 0 or above."""
    step = random_.randrange(len(problem.steps))
    error = random_.choice((1, 2, 10)) * random_.choice((-1, 1))
    if min(problem.totals[step:]) + error < 0 or (step == 0 and problem.steps[0][0] == "*" and error < 0):
        error = abs(error)
    return problem.response(step, error)


def write(folder: Path, task: ArithmeticTask, train: int, held_out: int, noise: float, seed: int) -> None:
    """Write `train.jsonl` (with noise) and `heldout.jsonl` (without) into `folder`, which is made when absent."""
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "train.jsonl", records(task, train, seed, held_out=False, noise=noise))
    write_lines(folder / "heldout.jsonl", records(task, held_out, seed, held_out=True))
