"""Arithmetic in another style: all additions come first, then the subtractions; the answers are the same.

    python recipes/reproductions/teacher_choice/other_order.py SOURCE.jsonl OTHER.jsonl [NOISE]

"7+5-3+8=" is solved by "7+5=12,12+8=20,20-3=17#17". NOISE is the share of the responses with one wrong step. A teacher
trained on it is far from a student that goes from left to right, however often it is right itself.
"""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path

from nemo_opd.tasks.arithmetic import Problem


def additions_first(prompt: str) -> Problem:
    """The problem of "7+5-3+8=" in the order of its solution: 7+5+8-3."""
    first, *moves = re.findall(r"(?:^|[+-])\d+", prompt.rstrip("="))
    steps = sorted(((move[0], int(move[1:])) for move in moves), key=lambda step: step[0] == "-")
    return Problem(int(first), tuple(steps))


def response(problem: Problem, noise: float, random_: random.Random) -> str:
    if random_.random() >= noise:
        return problem.response()
    return problem.response(random_.randrange(len(problem.steps)), error=random_.choice((1, 2, 10)))


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:3])
    noise, random_ = float(sys.argv[3]) if len(sys.argv) > 3 else 0.0, random.Random("other order")
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w") as file:
        for record in map(json.loads, source.read_text().splitlines()):
            solved = additions_first(record["prompt"])
            assert solved.answer == record["answer"]
            file.write(json.dumps({**record, "response": response(solved, noise, random_)}) + "\n")
