"""A run folder as the report needs it. Everything in it is taken for untrusted text and numbers.

Reads what is there: a run that is still going has no outcome, and its last line may be half written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_opd.configuration.strict_yaml import read_yaml
from nemo_opd.errors import ConfigError
from nemo_opd.reliability.outcome import Outcome, read_outcome

LONGEST_TEXT = 8000
"""Characters of a prompt or response that the page shows."""
MOST_TOKENS = 4000
"""Tokens of a response that the page shows one by one."""
SEARCH = 12
"""Neighbouring files that are looked into for one with tokens."""

Curve = list[tuple[int, float]]
"""(step, value), ascending; a value may be no number."""


@dataclass(frozen=True)
class RunData:
    """What is known of a run."""

    label: str
    path: Path
    outcome: Outcome | None
    settings: Mapping[str, str]
    """By dotted key; empty where config.yaml cannot be read."""
    curves: Mapping[str, Curve]
    findings: Sequence[Mapping[str, Any]]
    """What the diagnosis said, in order."""
    rollouts: Sequence[Mapping[str, Any]]
    """Saved responses of some steps, each with its `step`."""

    @property
    def steps(self) -> int:
        return max((curve[-1][0] for curve in self.curves.values()), default=0)

    def last(self, name: str) -> float | None:
        """The last value of a metric."""
        return self.curves[name][-1][1] if self.curves.get(name) else None


def read_run(path: Path, label: str, rollout_steps: int) -> RunData:
    """Read a run folder.

    Args:
        label: how the page calls it.
        rollout_steps: steps whose saved rollouts are shown.
    """
    return RunData(
        label=label,
        path=path,
        outcome=read_outcome(path),
        settings=read_settings(path / "config.yaml"),
        curves=read_curves(path / "metrics.jsonl"),
        findings=[line for line in read_lines(path / "diagnosis.jsonl") if isinstance(line.get("sign"), str)],
        rollouts=read_rollouts(path / "rollouts", rollout_steps),
    )


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a .jsonl file; nothing where there is no file, and without lines that are none."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict):
                yield line


def read_curves(path: Path) -> dict[str, Curve]:
    """Every metric over the steps."""
    curves: dict[str, Curve] = {}
    for line in read_lines(path):
        step = line.get("step")
        if not isinstance(step, int):
            continue
        for name, value in line.items():
            if _is_number(value) and name not in ("step", "policy_version"):
                curves.setdefault(name, []).append((step, float(value)))
    return {name: sorted(curve, key=lambda point: point[0]) for name, curve in curves.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_settings(path: Path) -> dict[str, str]:
    """Dotted keys of a stored configuration."""
    try:
        return dict(_flat(read_yaml(path).values))
    except (ConfigError, OSError, UnicodeDecodeError):
        return {}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)


def read_rollouts(folder: Path, steps: int) -> list[dict[str, Any]]:
    """The saved rollouts of some steps from the first to the last one, where possible of steps with tokens."""
    files = sorted(folder.glob("step-*.jsonl"))
    found = []
    for path in _spread(files, steps):
        for line in read_lines(path):
            if isinstance(line.get("response"), str):
                found.append(_cut(line) | {"step": int("".join(filter(str.isdigit, path.stem)) or 0)})
    return found


def _spread(files: Sequence[Path], count: int) -> list[Path]:
    last = len(files) - 1
    wanted = {round(i * last / max(1, count - 1)) for i in range(count)} if files else set()
    return [files[i] for i in sorted({_with_tokens(files, i) for i in wanted})]


def _with_tokens(files: Sequence[Path], near: int) -> int:
    """The file nearest to a position whose responses come with tokens; the position itself where there is none."""
    for distance in range(SEARCH):
        for i in (near - distance, near + distance):
            if 0 <= i < len(files) and "tokens" in next(read_lines(files[i]), {}):
                return i
    return near


def _cut(line: dict[str, Any]) -> dict[str, Any]:
    """Only what the page shows, in the types that it expects."""
    messages = line.get("messages")
    prompt = [
        f"{message.get('role', '')}: {message.get('content', '')}"
        for message in (messages if isinstance(messages, list) else [])
        if isinstance(message, dict)
    ]
    tokens = line.get("tokens")
    lists = {str(k): v[:MOST_TOKENS] for k, v in (tokens if isinstance(tokens, dict) else {}).items() if _is_list(v)}
    return {
        "index": str(line.get("index")),
        "sample": str(line.get("sample")),
        "prompt": "\n\n".join(prompt)[:LONGEST_TEXT],
        "answer": str(line.get("answer")),
        "response": line["response"][:LONGEST_TEXT],
        "length": str(line.get("response_tokens")),
        "finish": str(line.get("finish")),
        "reward": line["reward"] if _is_number(line.get("reward")) and math.isfinite(line["reward"]) else None,
        "tokens": {name: [_plain(item) for item in items] for name, items in lists.items()},
    }


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _plain(item: Any) -> Any:
    """A number, a truth or a text; null for a number that is none."""
    if _is_number(item):
        return item if math.isfinite(item) else None
    return item if item is None or isinstance(item, bool) else str(item)
