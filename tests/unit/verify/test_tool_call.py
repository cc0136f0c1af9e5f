from __future__ import annotations

import json
import time
from typing import Any

import pytest

from nemo_opd.config import VerifyConfig
from nemo_opd.types import Prompt
from nemo_opd.verify.build import build_verifier
from nemo_opd.verify.json_schema import check_schema, matches
from nemo_opd.verify.json_text import MAX_DEPTH, read_json, same_json

WEATHER = {"name": "weather", "arguments": {"city": "Paris", "days": 3, "exact": True}}


def reward(response: str, reference: Any, marker: str | None = None) -> float | None:
    verifier = build_verifier(VerifyConfig(name="tool_call", answer_pattern=marker))
    assert verifier is not None
    answer = reference if isinstance(reference, str) else json.dumps(reference)
    value = verifier(response, Prompt(index=0, epoch=0, messages=(), token_ids=(1,), answer=answer))
    assert "error" not in verifier.counts
    return value


def call(arguments: Any, name: str = "weather") -> str:
    return json.dumps({"name": name, "arguments": arguments})


@pytest.mark.parametrize(
    "response",
    [
        json.dumps(WEATHER),
        json.dumps(WEATHER, indent=2),
        '{"arguments": {"exact": true, "days": 3.0, "city": "Paris"}, "name": "weather"}',
        '{"name": "weather", "parameters": {"city": "P\\u0061ris", "days": 3, "exact": true}}',
        json.dumps([WEATHER]),
        json.dumps({"name": "weather", "arguments": json.dumps(WEATHER["arguments"])}),
        json.dumps({"id": "call_1", "type": "function", "function": WEATHER}),
        f"I look it up.\n<tool_call>\n{json.dumps(WEATHER)}\n</tool_call>",
        f"I look it up:\n```json\n{json.dumps(WEATHER)}\n```",
    ],
)
def test_equal_calls_are_right(response: str) -> None:
    assert reward(response, WEATHER) == 1.0


@pytest.mark.parametrize(
    "response",
    [
        "",
        "weather(city='Paris')",
        call(WEATHER["arguments"], "Weather"),
        call({"city": "Paris", "days": 3}),
        call({"city": "Paris", "days": 3, "exact": True, "more": None}),
        call({"city": "Paris", "days": "3", "exact": True}),
        call({"city": "Paris", "days": 3, "exact": 1}),
        call({"city": "Paris", "days": 4, "exact": True}),
        call([]),
        call("not JSON"),
        json.dumps([WEATHER, WEATHER]),
        json.dumps({**WEATHER, "parameters": {}}),
        json.dumps({**WEATHER, "extra": 1}),
        "[]",
        "null",
        json.dumps(WEATHER)[:-1] + ', "name": "weather"}',  # a key twice
        "text " + json.dumps(WEATHER),
        "{'name': 'weather'}",
        '{"name": "weather", "arguments": {"city": "Paris", "days": NaN, "exact": true}}',
        f"<tool_call>{json.dumps(WEATHER)}</tool_call><tool_call>{json.dumps(WEATHER)}</tool_call>",
        "__import__('os').system('true')",
    ],
)
def test_other_calls_are_wrong(response: str) -> None:
    assert reward(response, WEATHER) == 0.0


@pytest.mark.parametrize(
    "response",
    [
        "[" * 100_000, "[" * 19_000, '{"a":' * 3000, '"' * 19_999, "9" * 19_000, "1e999", "-" * 5000, "\\" * 5000,
        '{"name": "weather", "arguments": {"days": ' + "9" * 5000 + "}}", "\ud800", "<tool_call>" * 1500,
        "```json\n" * 2000, '{"name": "weather", "arguments": {"days": 1e999}}',
    ],
)  # fmt: skip
def test_hostile_texts_are_wrong_and_quick(response: str) -> None:
    began = time.process_time()
    assert reward(response, WEATHER) == 0.0
    assert time.process_time() - began < 1


def test_several_calls_count_in_their_order() -> None:
    two = [WEATHER, {"name": "time", "arguments": {}}]
    assert reward(json.dumps(two), two) == 1.0
    assert reward("".join(f"<tool_call>{json.dumps(c)}</tool_call>" for c in two), two) == 1.0
    assert reward(json.dumps(two[::-1]), two) == 0.0
    assert reward(json.dumps(two[:1]), two) == 0.0
    assert reward('{"name": "time"}', two[1]) == 1.0


def test_a_marker_stands_before_the_call() -> None:
    assert reward("text # " + json.dumps(WEATHER), WEATHER, "# ") == 1.0
    assert reward(json.dumps(WEATHER), WEATHER, "# ") == 0.0
    tagged = {"name": "tag", "arguments": {"text": "# one"}}
    assert reward("CALL " + json.dumps(tagged), tagged, "CALL ") == 1.0


SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "minLength": 1, "maxLength": 5},
        "days": {"type": "integer", "minimum": 1, "exclusiveMaximum": 8},
        "unit": {"enum": ["c", "f"]},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 2, "uniqueItems": True},
        "near": {"anyOf": [{"type": "null"}, {"type": "number"}]},
    },
    "required": ["city"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("arguments", "right"),
    [
        ({"city": "Paris"}, True), ({"city": "Paris", "days": 7, "unit": "f", "tags": ["x"], "near": 1.5}, True),
        ({"city": "Paris", "days": 2.0}, True), ({"city": "Paris", "near": None}, True),
        ({}, False), ({"city": ""}, False), ({"city": "London"}, False), ({"city": 1}, False),
        ({"city": "Paris", "days": 8}, False), ({"city": "Paris", "days": 0}, False),
        ({"city": "Paris", "days": 1.5}, False), ({"city": "Paris", "days": True}, False),
        ({"city": "Paris", "unit": "k"}, False), ({"city": "Paris", "tags": ["x", "x"]}, False),
        ({"city": "Paris", "tags": [1]}, False), ({"city": "Paris", "tags": ["x", "y", "z"]}, False),
        ({"city": "Paris", "near": "x"}, False), ({"city": "Paris", "other": 1}, False),
    ],
)  # fmt: skip
def test_arguments_against_a_schema(arguments: dict[str, Any], right: bool) -> None:
    assert reward(call(arguments), {"name": "weather", "schema": SCHEMA}) == float(right)
    assert reward(call(arguments, "other"), {"name": "weather", "schema": SCHEMA}) == 0.0


@pytest.mark.parametrize(
    "reference",
    [
        "not JSON", "[1]", '{"arguments": {}}', {"name": "w", "schema": {"pattern": "(a+)+$"}},
        {"name": "w", "schema": {"type": "text"}}, {"name": "w", "schema": {"properties": {"x": {"$ref": "#"}}}},
        {"name": "w", "schema": {"anyOf": []}}, {"name": "w", "schema": {"minimum": "1"}},
        {"name": "w", "schema": 3}, {"name": "w", "schema": {}, "arguments": {}}, {"name": 1, "schema": {}},
        {"name": "w", "schema": {"required": "x"}}, {"name": "w", "schema": {"properties": {"x": {"requird": ["y"]}}}},
    ],
)  # fmt: skip
def test_a_reference_that_cannot_be_applied_gives_no_reward(reference: Any) -> None:
    assert reward(json.dumps(WEATHER), reference) is None


def test_json_values_are_compared_by_value() -> None:
    assert same_json({"a": [1, 2.5, None, "x"]}, {"a": [1.0, 2.5, None, "x"]})
    for left, right in ((1, True), (0, False), (0, None), ("1", 1), ([1], [1, 1]), ({"a": 1}, {"b": 1}), ([], {})):
        assert not same_json(left, right) and not same_json(right, left)


def test_depth_is_counted_outside_of_texts_only() -> None:
    assert read_json(json.dumps("[" * 1000 + '"')) == "[" * 1000 + '"'
    assert read_json("[" * MAX_DEPTH + "]" * MAX_DEPTH) is not None
    with pytest.raises(ValueError, match="brackets"):
        read_json("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1))


def test_schemas_in_schemas() -> None:
    nested = {"allOf": [{"properties": {"a": {"const": 1}}}, {"minItems": 1}], "additionalProperties": {"type": "null"}}
    check_schema(nested)
    assert matches({"a": 1}, {"properties": {"a": True}, "additionalProperties": False})
    assert not matches({"a": 1}, {"properties": {"a": False}})
    assert matches({"b": None}, nested) and not matches({"b": 1}, nested) and not matches([], nested)
