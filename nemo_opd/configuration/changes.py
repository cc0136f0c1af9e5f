"""What of a recipe may change between two attempts at a run, and what makes it another run.

A run that is started again follows its recipe as it is now: more steps, another learning rate, another layout, other
intervals are ordinary. What decides which problem is being solved on which prompts is not: `ANOTHER_RUN`. Models and
data themselves are compared by their contents (`nemo_opd.checkpoint.fingerprint`), wherever they lie.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from nemo_opd.config import SLOTS, Config
from nemo_opd.configuration.strict_yaml import read_yaml
from nemo_opd.errors import ConfigError
from nemo_opd.reliability.redact import redact_data

log = logging.getLogger(__name__)

ANOTHER_RUN = (
    "run.seed",
    "student.dtype",
    *(f"data.{name}" for name in ("prompt_key", "answer_key", "response_key", "teacher_key", "chat_template")),
    *("data.template_arguments*", "data.system_prompt", "data.shuffle"),
    *(f"{slot}.name" for slot in SLOTS),
    *("teacher.source", "teachers.*.source"),
)
"""Patterns of keys. A slot's parameters may change, its choice may not."""
_PLACES = ("run.dir", "run.accept_changes")
"""Keys that say nothing about how a run goes."""
_UNSET = "nothing"


def check_changes(before: Path, step: int, config: Config) -> None:
    """Compare a recipe with the one that a checkpoint of this step was made with, and say what changed.

    Args:
        before: the checkpoint's `config.yaml`.

    Raises:
        ConfigError: it is another run's, and `run.accept_changes` is not set.
    """
    changed = changes(dict(_flat(read_yaml(before).values)), dict(_flat(redact_data(dataclasses.asdict(config)))))
    others = {key: pair for key, pair in changed.items() if makes_another_run(key)}
    if others and not config.run.accept_changes:
        got = ", ".join(str(now) for _, now in others.values())
        was = ", ".join(str(then) for then, _ in others.values())
        expected = f"{was}, as in the checkpoint of step {step} that the run would go on from"
        way_out = "choose another run.dir for another run; run.accept_changes=true goes on all the same"
        raise ConfigError(", ".join(others), got, expected, way_out)
    if changed:
        said = ", ".join(f"{key} {then} -> {now}" for key, (then, now) in changed.items())
        log.log(logging.WARNING if others else logging.INFO, "changed since step %d: %s", step, said)


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """(before, now) by dotted key. A key that only one of them knows counts where it may make another run: otherwise
    the schema has grown, or the parameters of another choice are not comparable."""
    changed = {}
    for key in (*before, *(key for key in now if key not in before)):
        pair = before.get(key, _UNSET), now.get(key, _UNSET)
        comparable = (key in before and key in now) or makes_another_run(key)
        if pair[0] != pair[1] and comparable and key not in _PLACES:
            changed[key] = pair
    return changed


def makes_another_run(key: str) -> bool:
    """Does the key stand for what a run is about?"""
    return any(fnmatchcase(key, pattern) for pattern in ANOTHER_RUN)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
