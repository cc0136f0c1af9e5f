"""Places where a run can be made to break."""

from __future__ import annotations

import ast
import errno
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_opd.reliability import faults

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A place for these tests; their rules end with them."""
    monkeypatch.setitem(faults.POINTS, "a.place", "in a test")
    yield
    faults.arm("")


def test_every_place_stands_in_the_code_and_in_a_test() -> None:
    """In the code once: a name that stands in two places says nothing about where it broke."""
    in_code = [
        node.args[0].value
        for path in (ROOT / "nemo_opd").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "faults.hit"
        and isinstance(node.args[0], ast.Constant)
    ]
    points = sorted(set(faults.POINTS) - {"a.place"})
    assert sorted(in_code) == points
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__))
    assert [point for point in points if not re.search(rf"\b{re.escape(point)}\b", tests)] == []


def test_without_rules_nothing_happens() -> None:
    for point in faults.POINTS:
        faults.hit(point)


def test_it_happens_the_nth_time_and_no_other() -> None:
    faults.arm("a.place=raise@2")
    faults.hit("a.place")
    with pytest.raises(faults.InjectedFault, match=r"injected at a\.place"):
        faults.hit("a.place")
    faults.hit("a.place")


def test_a_rule_for_another_rank_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    faults.arm("a.place=raise rank=1")
    faults.hit("a.place")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(faults.InjectedFault):
        faults.hit("a.place")


def test_a_full_disk_is_an_error_of_the_system() -> None:
    faults.arm("a.place=enospc")
    with pytest.raises(OSError, match="No space left") as raised:
        faults.hit("a.place")
    assert raised.value.errno == errno.ENOSPC


@pytest.mark.parametrize(("action", "status"), [("kill", -9), ("sleep:0.01", 0)])
def test_a_process_dies_or_waits(action: str, status: int) -> None:
    code = "import sys; from nemo_opd.reliability import faults; faults.POINTS['a.place'] = ''; "
    code += "faults.arm(sys.argv[1]); faults.hit('a.place')"
    command = [sys.executable, "-c", code, f" a.place={action} ;"]
    assert subprocess.run(command, check=False, cwd=ROOT).returncode == status


def test_a_process_reads_its_rules_when_it_starts() -> None:
    environment = {**os.environ, faults.VARIABLE: "nowhere=kill"}
    command = [sys.executable, "-c", "import nemo_opd.reliability.faults"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    assert "got 'nowhere=kill'; expected POINT=kill" in done.stderr


@pytest.mark.parametrize("text", ["a.place", "a.place=explode", "nowhere=kill", "a.place=kill@x"])
def test_what_is_no_rule_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected POINT=kill"):
        faults.parse(text)
