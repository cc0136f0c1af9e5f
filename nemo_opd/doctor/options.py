"""What the command line says about a preflight, besides the recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

REFERENCES = ("auto", "always", "never")


@dataclass(frozen=True)
class Options:
    """How much is measured, and how strictly it is judged."""

    prompts: int = 8
    """Of the recipe's data; one response is written to each."""
    tokens: int = 128
    """Longest response, or `rollout.max_new_tokens` where that is less."""
    reference: str = "auto"
    """Ask a second engine about the teacher, and the teacher's engine about the student: auto (models up to
    `SMALL_BYTES`), always or never"""
    bounds: Mapping[str, float] = field(default_factory=dict)
    """In the place of the defaults of `nemo_opd.doctor.bounds`."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Options:
        return cls(**json.loads(text))


SMALL_BYTES = 4 << 30
"""Weights up to this size are loaded a second time for a reference, if nobody says otherwise."""
