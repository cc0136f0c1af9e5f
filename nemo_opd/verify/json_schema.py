"""JSON Schema (draft 2020-12) for the arguments of tools, through `jsonschema`, with less than a schema may say.

A keyword that the draft does not know is refused, although the draft would pass it over: a misspelt rule that is not
applied would let wrong answers through. ``pattern`` and ``patternProperties`` are refused, since a regular expression
over hostile text can run for ever, and so are references, which can lead in circles or out of the file.
"""

from __future__ import annotations

from typing import Any

from jsonschema import Draft202012Validator
from referencing import Registry

_DRAFT = Draft202012Validator.META_SCHEMA["$id"]
_REFUSED = ("pattern", "patternProperties", "$ref", "$dynamicRef")
_STRICT_META_SCHEMA = {
    "$schema": _DRAFT,
    "$id": "urn:nemo-opd:strict-schema",
    "$dynamicAnchor": "meta",  # so that the draft applies this one, and not itself, to schemas within a schema
    "$ref": _DRAFT,
    "properties": dict.fromkeys(_REFUSED, False),
    "unevaluatedProperties": False,
}
_SCHEMAS = Draft202012Validator(_STRICT_META_SCHEMA)


def check_schema(schema: Any) -> None:
    """Raises ValueError for what is no schema, or says what is refused here."""
    errors = list(_SCHEMAS.iter_errors(schema))
    if errors:  # a keyword with a wrong value also counts as one that was not evaluated, which says less
        error = min(errors, key=lambda e: (e.validator == "unevaluatedProperties", -len(e.path)))
        raise ValueError(f"{error.json_path}: {error.message[:200]}")


def matches(value: Any, schema: Any) -> bool:
    """Does a JSON value obey a schema that `check_schema` has accepted?"""
    return Draft202012Validator(schema, registry=Registry()).is_valid(value)
