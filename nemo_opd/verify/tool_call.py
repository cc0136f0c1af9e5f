"""The verifier for tool calls: JSON that names a tool and its arguments."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from nemo_opd.verify.base import UnreadableReferenceError, Verifier
from nemo_opd.verify.json_schema import check_schema, matches
from nemo_opd.verify.json_text import read_json, same_json

if TYPE_CHECKING:  # importing it loads torch
    from nemo_opd.types import Prompt

_TAGGED = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_FENCED = re.compile(r"```(?:json)?[ \t]*\n(.*?)```", re.DOTALL)


class ToolCallVerifier(Verifier):
    """1 when the response calls the reference's tools, in this order, with arguments that are equal or obey its schema.

    A call is ``{"name": text, "arguments": object}``, alone or within ``{"type": "function", "function": ...}``;
    ``parameters`` is read as ``arguments``, and arguments written as a text of JSON are read once more. The response's
    calls are what follows `verify.answer_pattern` where it is set, else all ``<tool_call>`` blocks, else the last
    fenced block, else the whole response: one call or a list.

    The reference is one call or a list, as JSON, in which ``arguments`` may be replaced by ``schema``
    (`nemo_opd.verify.json_schema`): ``{"name": "weather", "schema": {"required": ["city"]}}``. Text is parsed by the
    `json` module within limits of size and depth, never evaluated.
    """

    def compare(self, response_text: str, prompt: Prompt) -> float:
        assert prompt.answer is not None
        expected = _references(prompt.answer)
        if self._marker is not None and self._marker not in response_text:
            return 0.0
        try:
            found = [_call(call) for call in self._written(response_text)]
        except (ValueError, RecursionError):
            return 0.0
        return float(len(found) == len(expected) and all(map(_is_as_expected, found, expected)))

    def _written(self, response_text: str) -> list[Any]:
        """The calls as parsed. Raises ValueError where they are not JSON."""
        if self._marker is not None:
            return _listed(read_json(self._after_marker(response_text).strip()))
        if tagged := _TAGGED.findall(response_text):
            return [call for text in tagged for call in _listed(read_json(text.strip()))]
        fenced = _FENCED.findall(response_text)
        return _listed(read_json((fenced[-1] if fenced else response_text).strip()))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _call(value: Any) -> tuple[str, Any]:
    """Name and arguments. Raises ValueError for anything that is not a call."""
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError("a call is an object with a name")
    others = value.keys() - {"name", "id", "type"}
    if len(others) > 1 or not others <= {"arguments", "parameters"}:
        raise ValueError(f"a call has one field arguments besides its name, not {sorted(others)}")
    arguments = value[others.pop()] if others else {}
    if isinstance(arguments, str):
        arguments = read_json(arguments)
    if not isinstance(arguments, dict):
        raise ValueError("arguments are an object")
    return value["name"], arguments


def _references(text: str) -> list[tuple[str, Any, bool]]:
    """Of each expected call: name, arguments or schema, and whether it is a schema."""
    found = []
    try:
        for value in _listed(read_json(text.strip())):
            if isinstance(value, dict) and "schema" in value:
                if value.keys() != {"name", "schema"} or not isinstance(value["name"], str):
                    raise ValueError("a reference with a schema has the fields name and schema")
                check_schema(value["schema"])
                found.append((value["name"], value["schema"], True))
            else:
                found.append((*_call(value), False))
    except (ValueError, RecursionError) as error:
        raise UnreadableReferenceError(f"{text[:80]!r} is no reference for tool calls: {error}") from error
    return found


def _is_as_expected(call: tuple[str, Any], expected: tuple[str, Any, bool]) -> bool:
    name, arguments = call
    expected_name, value, is_schema = expected
    return name == expected_name and (matches(arguments, value) if is_schema else same_json(arguments, value))
