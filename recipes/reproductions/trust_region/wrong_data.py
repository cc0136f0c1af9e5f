"""Arithmetic with one rule that is wrong, always: a step that adds or subtracts 7 comes out one too high.

    python recipes/reproductions/trust_region/wrong_data.py RIGHT.jsonl WRONG.jsonl

A student trained on it is confidently wrong where its teacher is confidently right.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path


def wrong(prompt: str) -> str:
    """The response to "7+5-3=": "7+5=12,12-3=9#9", with the wrong rule."""
    first, *moves = re.findall(r"(?:^|[+-])\d+", prompt.rstrip("="))
    total, steps = int(first), []
    for move in moves:
        result = total + int(move) + (abs(int(move)) == 7)
        steps.append(f"{total}{move}={result}")
        total = result
    return ",".join(steps) + f"#{total}"


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w") as file:
        for record in map(json.loads, source.read_text().splitlines()):
            file.write(json.dumps({**record, "response": wrong(record["prompt"])}) + "\n")
