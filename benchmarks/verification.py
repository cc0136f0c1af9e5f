"""How the verifiers grade GSM8K's reference answers and answers near them.

    python -m benchmarks.verification PATH/gsm8k_test.jsonl

Prints the table of docs/verification.md. Takes a few minutes: the verifier for mathematics grades 14,000 answers.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nemo_opd.config import VerifyConfig
from nemo_opd.types import Prompt
from nemo_opd.verify.build import build_verifier

MARKER = "#### "


@dataclass(frozen=True)
class Case:
    """A response to a problem, and whether it is right."""

    problem: int
    kind: str
    response: str
    right: bool


def read_problems(path: Path) -> list[Prompt]:
    """GSM8K's problems; the answer is the whole reference solution, which ends with the marker and a number."""
    lines = path.read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [
        Prompt(
            index=i,
            epoch=0,
            messages=({"role": "user", "content": r["question"]},),
            token_ids=(0,),
            answer=r["answer"],
        )
        for i, r in enumerate(records)
    ]


def cases(problems: list[Prompt]) -> Iterator[Case]:
    """For every problem: the reference solution, the number alone, and numbers that are near but wrong."""
    for i, problem in enumerate(problems):
        assert problem.answer is not None
        steps, _, final = problem.answer.rpartition(MARKER)
        yield Case(i, "reference", problem.answer, True)
        yield Case(i, "separators", f"{MARKER}{int(final.replace(',', '')):,}", True)
        for kind, wrong in perturbations(final):
            yield Case(i, kind, f"{steps}{MARKER}{wrong}", False)


def perturbations(final: str) -> Iterator[tuple[str, str]]:
    """Wrong answers near a right whole number."""
    digits = final.replace(",", "")
    number = int(digits)
    yield "one more", str(number + 1)
    yield "one less", str(number - 1)
    yield "digit appended", digits + "0" if number else "10"
    yield "half more", digits + ".5"
    yield "two numbers", f"{number} {number + 1}"
    if number:
        yield "sign changed", str(-number)
    if len(digits.lstrip("-")) > 1:
        yield "digit dropped", digits[:-1]
    swapped = digits[:-2] + digits[-1] + digits[-2] if len(digits) > 1 and "-" not in digits[-2:] else digits
    if int(swapped) != number:
        yield "digits swapped", swapped
    yield "none", ""


def main() -> int:
    problems = read_problems(Path(sys.argv[1]))
    print("| answers | n | right | accepted by `integer` | accepted by `math` |\n|---|---|---|---|---|")
    every = list(cases(problems))
    accepted: dict[str, Counter[str]] = {}
    spent = {}
    for name in ("integer", "math"):
        verifier = build_verifier(VerifyConfig(name=name, answer_pattern=MARKER))
        assert verifier is not None
        started = time.perf_counter()
        accepted[name] = Counter(c.kind for c in every if verifier(c.response, problems[c.problem]) == 1.0)
        spent[name] = time.perf_counter() - started
        verifier.close()
    for kind, n in Counter(c.kind for c in every).items():
        right = "yes" if next(c.right for c in every if c.kind == kind) else "no"
        print(f"| {kind} | {n:,} | {right} | {accepted['integer'][kind]:,} | {accepted['math'][kind]:,} |")
    print(f"\n{len(every):,} answers; seconds: " + ", ".join(f"{name} {s:.1f}" for name, s in spent.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
