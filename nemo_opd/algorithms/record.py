"""What makes a named algorithm: its choices for the slots, and the settings of its paper."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_opd.config import SlotConfig


@dataclass(frozen=True)
class Algorithm:
    """A layer of configuration between the schema and the recipe.

    Example: ``Algorithm("sft", "...", slots={"loss": CrossEntropyLoss()}, settings={"teacher.engine": "none"})``.
    Nothing reads the name after the configuration is loaded.
    """

    name: str
    source: str
    """Where the formula comes from, in a few words."""
    slots: Mapping[str, SlotConfig] = field(default_factory=dict)
    """The slots that differ from plain on-policy distillation, filled with the source's values."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Other settings by dotted key."""
