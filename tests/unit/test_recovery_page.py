"""docs/recovery.md and the command that measures what it promises speak of the same things."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.promises import PROMISES, recording_tests, table

ROOT = Path(__file__).parents[2]
ROWS = dict(re.findall(r"^\| (R\d+) \| (.*)$", (ROOT / "docs" / "recovery.md").read_text(), re.MULTILINE))


def test_every_promise_stands_there_with_tests_that_exist() -> None:
    assert list(ROWS) == list(PROMISES)
    for promise, row in ROWS.items():
        paths = re.findall(r"`(tests/[\w/]+\.py)`", row)
        assert paths, promise
        assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_promise_has_a_figure_in_one_of_its_tests() -> None:
    recording = {path: (ROOT / path).read_text() for path in recording_tests()}
    for promise, row in ROWS.items():
        named = re.findall(r"`(tests/[\w/]+\.py)`", row)
        assert any(f'record("{promise}"' in recording.get(path, "") for path in named), promise


def test_a_promise_without_a_figure_says_so() -> None:
    lines = table([{"promise": "R2", "what": "tensors that differ", "value": "0 / 9"}])
    assert f"| R2 | {PROMISES['R2']} | tensors that differ | 0 / 9 |" in lines
    assert f"| R1 | {PROMISES['R1']} | none in this run | - |" in lines
