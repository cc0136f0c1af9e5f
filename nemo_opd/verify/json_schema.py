"""A part of JSON Schema (draft 2020-12) large enough for the arguments of tools.

Known: true and false, ``type`` (a name or a list), ``enum``, ``const``, ``properties``, ``required``,
``additionalProperties``, ``items``, ``minItems``, ``maxItems``, ``uniqueItems``, ``minLength``, ``maxLength``,
``minimum``, ``maximum``, ``exclusiveMinimum``, ``exclusiveMaximum``, ``anyOf``, ``allOf``. Annotations (``title``,
``description``, ``default``, ``examples``, ``$schema``) say nothing about validity. Any other keyword is refused, not
passed over: a rule that is not applied would let wrong answers through. ``pattern`` is among the refused, since a
regular expression over hostile text can run for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nemo_opd.verify.json_text import same_json

Schema = bool | Mapping[str, Any]

_TYPES: dict[str, Callable[[Any], bool]] = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: _is_number(value) and value == int(value),
    "number": lambda value: _is_number(value),
    "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}
_ANNOTATIONS = {"title", "description", "default", "examples", "$schema"}
_OF_NUMBERS: dict[str, Callable[[Any, Any], bool]] = {
    "minimum": lambda value, bound: value >= bound,
    "maximum": lambda value, bound: value <= bound,
    "exclusiveMinimum": lambda value, bound: value > bound,
    "exclusiveMaximum": lambda value, bound: value < bound,
}
_OF_SIZES = {"minItems": list, "maxItems": list, "minLength": str, "maxLength": str}
_OF_LISTS_OF_SCHEMAS = {"anyOf": any, "allOf": all}
_OTHERS = {"type", "enum", "const", "properties", "required", "additionalProperties", "items", "uniqueItems"}


def check_schema(schema: Any) -> None:
    """Refuse what `matches` could not apply.

    Raises:
        ValueError: an unknown keyword, an unknown type, or a value of the wrong kind.
    """
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise ValueError(f"a schema is an object or a boolean, not {type(schema).__name__}")
    known = _OTHERS | _ANNOTATIONS | _OF_NUMBERS.keys() | _OF_SIZES.keys() | _OF_LISTS_OF_SCHEMAS.keys()
    if unknown := schema.keys() - known:
        raise ValueError(f"schema keywords {sorted(unknown)} are not known here")
    for name in _names(schema.get("type", [])):
        if name not in _TYPES:
            raise ValueError(f"type {name!r} is none of {sorted(_TYPES)}")
    for key, kind in {"enum": list, "required": list, "properties": dict, "uniqueItems": bool}.items():
        if key in schema and not isinstance(schema[key], kind):
            raise ValueError(f"{key} is not a {kind.__name__}")
    for key in _OF_NUMBERS.keys() | _OF_SIZES.keys():
        if key in schema and not _is_number(schema[key]):
            raise ValueError(f"{key} is not a number")
    for inner in _schemas_within(schema):
        check_schema(inner)


def matches(value: Any, schema: Schema) -> bool:
    """Does a JSON value obey a schema that `check_schema` has accepted?"""
    if isinstance(schema, bool):
        return schema
    return (
        _matches_value(value, schema)
        and (not isinstance(value, dict) or _matches_object(value, schema))
        and (not isinstance(value, list) or _matches_array(value, schema))
        and all(
            decide(matches(value, inner) for inner in schema[key])
            for key, decide in _OF_LISTS_OF_SCHEMAS.items()
            if key in schema
        )
    )


def _matches_value(value: Any, schema: Mapping[str, Any]) -> bool:
    if "type" in schema and not any(_TYPES[name](value) for name in _names(schema["type"])):
        return False
    if "enum" in schema and not any(same_json(value, allowed) for allowed in schema["enum"]):
        return False
    if "const" in schema and not same_json(value, schema["const"]):
        return False
    for key, holds in _OF_NUMBERS.items():
        if key in schema and _is_number(value) and not holds(value, schema[key]):
            return False
    for key, kind in _OF_SIZES.items():
        if key in schema and isinstance(value, kind):
            too_small = key.startswith("min") and len(value) < schema[key]
            if too_small or (key.startswith("max") and len(value) > schema[key]):
                return False
    return True


def _matches_object(value: dict[str, Any], schema: Mapping[str, Any]) -> bool:
    properties = schema.get("properties", {})
    other = schema.get("additionalProperties", True)
    return set(schema.get("required", ())) <= value.keys() and all(
        matches(inner, properties.get(key, other)) for key, inner in value.items()
    )


def _matches_array(value: list[Any], schema: Mapping[str, Any]) -> bool:
    if schema.get("uniqueItems") and any(same_json(a, b) for i, a in enumerate(value) for b in value[:i]):
        return False
    return all(matches(inner, schema.get("items", True)) for inner in value)


def _schemas_within(schema: Mapping[str, Any]) -> list[Any]:
    found = [schema[key] for key in ("items", "additionalProperties") if key in schema]
    found.extend(schema.get("properties", {}).values())
    for key in _OF_LISTS_OF_SCHEMAS.keys() & schema.keys():
        if not isinstance(schema[key], list) or not schema[key]:
            raise ValueError(f"{key} is not a list of schemas")
        found.extend(schema[key])
    return found


def _names(types: Any) -> list[Any]:
    return types if isinstance(types, list) else [types]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
