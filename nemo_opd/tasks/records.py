"""What all generated tasks share: sides, distinct problems, and files that are complete or absent."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from nemo_opd.errors import ConfigError

Record = dict[str, Any]
"""One line of a file: `prompt` (a text, or messages), `answer`, `response`, and more fields of the task."""

PRIVILEGED = "privileged"
"""Field with what a teacher may read and the student may not (`context.field`)."""

Drawn = TypeVar("Drawn")

_HELD_OUT_OF_256 = 32
"""Share of all problems on the held-out side, in 256ths."""
_ATTEMPTS_PER_PROBLEM = 200
"""Random draws after which a new problem is taken not to exist."""


def is_held_out(prompt: str) -> bool:
    """On which side a problem falls: a function of its text alone, whatever the seed."""
    return hashlib.blake2b(prompt.encode(), digest_size=1).digest()[0] < _HELD_OUT_OF_256


def distinct(draw: Callable[[], Drawn], held_out: bool, prompt_of: Callable[[Drawn], str]) -> Iterator[Drawn]:
    """Drawn problems of one side whose prompts differ, endlessly.

    Raises:
        ConfigError: no new one was found in many draws: there are too few.
    """
    seen: set[str] = set()
    while True:
        for _ in range(_ATTEMPTS_PER_PROBLEM):
            drawn = draw()
            prompt = prompt_of(drawn)
            if is_held_out(prompt) == held_out and prompt not in seen:
                break
        else:
            side = "held-out" if held_out else "training"
            raise ConfigError(
                f"{side} problems", len(seen), "more of them to exist", "ask for fewer, or for longer problems"
            )
        seen.add(prompt)
        yield drawn


def with_system(privileged: str, prompt: str) -> list[dict[str, str]]:
    """A prompt that holds the privileged text, as `context=privileged context.place=system` renders it."""
    return [{"role": "system", "content": privileged}, {"role": "user", "content": prompt}]


def write_files(folder: Path, files: Mapping[str, Iterator[Record]]) -> None:
    """Write ``NAME.jsonl`` for each name into `folder`, which is made when absent."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        write_lines(folder / f"{name}.jsonl", lines)


def write_lines(path: Path, lines: Iterator[Record]) -> None:
    """Complete or absent: a file of half the problems would pass for a whole one."""
    unfinished = path.with_name(path.name + ".tmp")
    with unfinished.open("w", encoding="utf-8") as file:
        for record in lines:
            file.write(json.dumps(record) + "\n")
    unfinished.replace(path)


def check_share(key: str, share: float) -> None:
    """Raises ConfigError for a share outside [0, 1]."""
    if not 0 <= share <= 1:
        raise ConfigError(key, share, "a share in [0, 1]", "0 for none, 1 for all")
