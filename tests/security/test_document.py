"""docs/security.md names tests that exist, every refusal, and the floors that the preflight has."""

from __future__ import annotations

import re
from pathlib import Path

from nemo_opd.doctor.installed import FLOORS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "security.md").read_text()


def test_every_test_that_is_named_exists() -> None:
    named = set(re.findall(r"`(tests/[\w/.]+)`", TEXT))
    assert len(named) > 20
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []
    files = {f"tests/security/{path.name}" for path in (ROOT / "tests" / "security").glob("test_*.py")}
    assert files - named == {"tests/security/test_document.py"}, "name new ones"


def test_every_refusal_has_a_row_with_a_test_and_a_figure() -> None:
    rows = re.findall(r"^\| (S\d+) \| (.+) \| (.+) \| (.+) \|$", TEXT, re.MULTILINE)
    assert [name for name, *_ in rows] == [f"S{number}" for number in range(1, 14)]
    for name, refused, tests, figure in rows:
        assert refused and "tests/" in tests and figure.strip(), name


def test_the_floors_are_those_of_the_preflight() -> None:
    table = TEXT[TEXT.index("## Version floors") :]
    rows = re.findall(r"^\| ([\w, -]+) \| (\d[\d.]+) \| (.+) \|$", table, re.MULTILINE)
    named = {name.strip(): (floor, reason) for names, floor, reason in rows for name in names.split(",")}
    assert {name: floor for name, (floor, _) in named.items()} == {name: floor for name, (floor, _) in FLOORS.items()}
    for name, (_, reason) in FLOORS.items():
        for advisory in re.findall(r"CVE-[\d-]+", reason):
            assert advisory in named[name][1], name
