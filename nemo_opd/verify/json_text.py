"""JSON from strangers: bounded in size and depth, without duplicate keys, compared by value."""

from __future__ import annotations

import json
import math
from typing import Any

MAX_CHARACTERS = 20_000
MAX_DEPTH = 32
"""Brackets open at a time."""
MAX_INTEGER_DIGITS = 400


def read_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: not JSON, or longer, deeper or with larger numbers than the limits above; a key that stands twice
            in an object; or NaN and Infinity, which JSON does not have.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{len(text)} characters, at most {MAX_CHARACTERS} are read")
    _check_depth(text)
    return json.loads(
        text, object_pairs_hook=_object, parse_constant=_no_constant, parse_int=_integer, parse_float=_float
    )


def same_json(left: Any, right: Any) -> bool:
    """Equal as JSON values: 1 is 1.0, but true is not 1; objects ignore the order of their keys.

    Example: ``same_json({"a": 1, "b": [True]}, {"b": [True], "a": 1.0})``.
    """
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, int | float) and isinstance(right, int | float):
        return left == right
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same_json, left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same_json(value, right[key]) for key, value in left.items())
    return type(left) is type(right) and bool(left == right)


def _check_depth(text: str) -> None:
    """Before anything is parsed, so that no parser recurses on a text of brackets."""
    depth, in_string, escaped = 0, False, False
    for character in text:
        if escaped:
            escaped = False
        elif in_string:
            escaped, in_string = character == "\\", character != '"'
        elif character == '"':
            in_string = True
        elif character in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise ValueError(f"more than {MAX_DEPTH} brackets open")
        elif character in "]}":
            depth -= 1


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in an object")
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _integer(text: str) -> int:
    if len(text) > MAX_INTEGER_DIGITS:
        raise ValueError(f"a number of {len(text)} digits, at most {MAX_INTEGER_DIGITS} are read")
    return int(text)


def _float(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:80]} is beyond the numbers that are read")
    return number
