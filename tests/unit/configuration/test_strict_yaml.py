"""Scalars by YAML's core schema, lines of keys."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from nemo_opd.configuration.strict_yaml import parse_scalar, read_yaml

SCALARS: list[tuple[str, Any]] = [
    ("1", 1),
    ("-7", -7),
    ("1_000", 1000),
    ("0", 0),
    ("007", 7),
    ("1e-6", 1e-6),
    ("2.5", 2.5),
    (".5", 0.5),
    ("1.", 1.0),
    (".inf", math.inf),
    ("-.inf", -math.inf),
    ("true", True),
    ("False", False),
    ("null", None),
    ("~", None),
    ("", None),
    ("no", "no"),
    ("on", "on"),
    ("1:30", "1:30"),
    ("0x10", "0x10"),
    ("2026-01-01", "2026-01-01"),
    ("-", "-"),
    ("1e", "1e"),
    ("!!python/name:os.system", "!!python/name:os.system"),
]


@pytest.mark.parametrize(("text", "value"), SCALARS, ids=[text or "empty" for text, _ in SCALARS])
def test_scalars(text: str, value: Any) -> None:
    parsed = parse_scalar(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_every_key_has_its_line(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("# comment\na:\n  b: 1\n\n  c: {d: 2,\n      e: [1, 2]}\nf:\n")
    document = read_yaml(path)
    assert document.values == {"a": {"b": 1, "c": {"d": 2, "e": [1, 2]}}, "f": None}
    assert document.lines == {"a": 2, "a.b": 3, "a.c": 5, "a.c.d": 5, "a.c.e": 6, "f": 7}
    assert document.where("a.c.e") == f"{path}:6"
    assert document.where("a.b.unknown") == f"{path}:3"


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("# nothing\n")
    assert read_yaml(path).values == {}
