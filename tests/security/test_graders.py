"""S5 and S6 over all graders at once: no hostile text is run, earns a reward, costs more than its time, or changes what
the next honest answer gets. What each grader refuses in detail is tested in tests/unit/verify/."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_opd.config import VerifyConfig
from nemo_opd.types import Prompt
from nemo_opd.verify import jail
from nemo_opd.verify.base import Verifier
from nemo_opd.verify.build import build_verifier
from nemo_opd.verify.jail import GradingTimeoutError, Limits
from tests.unit.verify import hostile_programs as programs
from tests.unit.verify.test_math import CODE, HOSTILE

CALL = {"name": "add", "arguments": {"a": 3, "b": 4}}
HONEST: dict[str, list[tuple[str, str, float]]] = {
    "exact": [("7", "7", 1.0), ("8", "7", 0.0)],
    "integer": [("7", "7", 1.0), ("1,000", "1000", 1.0), ("8", "7", 0.0)],
    "math": [("7", "7", 1.0), ("\\frac{14}{2}", "7", 1.0), ("8", "7", 0.0)],
    "choice": [("B", "B", 1.0), ("A", "B", 0.0)],
    "tool_call": [(json.dumps(CALL), json.dumps(CALL), 1.0), ("{}", json.dumps(CALL), 0.0)],
}
"""Grader -> answer, reference, reward."""
MORE = {
    "huge exponent": "1e400000000",
    "negative exponent": "10**-400000000",
    "shifted": "1<<10000000000",
    "nested lists": "[" * 20_000,
    "nested objects": '{"a":' * 20_000,
    "nested signs": "-" * 20_000 + "7",
    "nested calls": "f(" * 5_000 + "7" + ")" * 5_000,
    "backtracking": "a" * 20_000 + "!",
    "surrogates": "\ud800\udfff" * 100,
    "digits of other scripts": "٧" * 1000,
    "wide": "７" * 1000,
    "format": "{0.__class__}" * 500,
    "percent": "%s%n" * 500,
    "template": "{{ 7*7 }}${7*7}",
    "yaml": "!!python/object/apply:os.system ['touch {canary}']",
    "pickle": "cos\nsystem\n(S'touch {canary}'\ntR.",
}


@pytest.fixture(scope="module", params=HONEST)
def grader(request: pytest.FixtureRequest) -> Iterator[tuple[str, Verifier]]:
    made = build_verifier(VerifyConfig(name=request.param, answer_pattern="####", time_limit=0.8))
    assert made is not None
    yield request.param, made
    made.close()


def prompt(answer: str) -> Prompt:
    return Prompt(index=0, epoch=0, messages=(), token_ids=(1,), answer=answer)


def test_hostile_answers_change_nothing(grader: tuple[str, Verifier], tmp_path: Path) -> None:
    name, verifier = grader
    canary = tmp_path / "canary"

    def honest() -> list[float | None]:
        return [verifier(f"#### {answer}", prompt(reference)) for answer, reference, _ in HONEST[name]]

    expected: list[float | None] = [reward for *_, reward in HONEST[name]]
    assert honest() == expected
    texts = HOSTILE | MORE | {f"code {n}": text.format(canary=canary) for n, text in enumerate(CODE)}
    wrong = []
    for kind, text in texts.items():
        text = text.replace("{canary}", str(canary))
        began = time.process_time()
        reward = verifier(f"#### {text}", prompt(HONEST[name][0][1]))
        seconds = time.process_time() - began
        if reward != 0.0 or seconds > 1:
            wrong.append((kind, reward, seconds))
        if kind.startswith("nested") and honest() != expected:
            wrong.append((kind, "changed the next answer's reward", 0.0))
    assert not wrong, wrong
    assert honest() == expected, "honest reward changed 0"
    assert not canary.exists(), "executed 0"
    assert verifier.counts["error"] + verifier.counts["unavailable"] == 0 or name == "math"
    sys.stdout.write(f"S5: {name}: {len(texts)} hostile texts, executed 0, honest rewards changed 0\n")


def test_a_program_ends_within_its_limit_of_cpu_time_and_a_second(tmp_path: Path) -> None:
    """Both processes of a jail, from their start to their end, whatever the program does to its signals."""
    limits = Limits(seconds=1)
    namespaces = jail.namespaces_permitted()
    assert jail.run_tests("def solve(n): return n * n", programs.CHEATS_TESTS, limits, namespaces) == (True, 2)
    slowest = 0.0
    for program in programs.SLOW.values():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        try:
            passed, _ = jail.run_tests(program, programs.CHEATS_TESTS, limits, namespaces)
        except GradingTimeoutError:
            passed = False
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert not passed
        slowest = max(slowest, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert slowest <= limits.seconds + 1
    count = len(programs.CHEATS) + len(programs.SLOW) + len(programs.PROBES)
    sys.stdout.write(f"S6: {count} programs, slowest {slowest:.2f} s of CPU time at a limit of {limits.seconds} s\n")
