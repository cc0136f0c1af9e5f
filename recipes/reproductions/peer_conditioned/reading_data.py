"""Problems as a model reads them that is shown other attempts, in the very layout of `context: peers`.

    python recipes/reproductions/peer_conditioned/reading_data.py DATA OUT

DATA is a folder of `nemo-opd data arithmetic`. Into OUT comes `reading.jsonl`, for SFT: problems alone, with a success,
a failure or both, or with a success and a failure of another problem. What follows is right where a success of this
problem is shown; elsewhere half of it has a wrong step, but never the mistake that is shown. Of the held-out problems
come `heldout_KIND.jsonl`, which say how well a model reads.
"""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path
from typing import Any

from nemo_opd.prompts.template import load_tokenizer
from nemo_opd.tasks.arithmetic import Problem
from nemo_opd.tasks.records import write_lines
from nemo_opd.teacher.insertion import PARAGRAPH, ContextRenderer
from nemo_opd.teacher.peers import FAILURE, FIRST_SUCCESS

KINDS = {"alone": 0.2, "success": 0.25, "contrastive": 0.3, "failure": 0.1, "unrelated": 0.15}
"""Shares of reading.jsonl."""
TOLD = ("success", "contrastive")
ROUNDS = 8
"""How often each problem stands there, with other attempts."""
NOISE = 0.5
"""Share of wrong responses where no success is shown."""
ERRORS = (-10, -2, -1, 1, 2, 10)
"""By how much a wrong step is off."""


def parsed(prompt: str) -> Problem:
    first, *moves = re.findall(r"(?:^|[+-])\d+", prompt.rstrip("="))
    return Problem(int(first), tuple((move[0], int(move[1:])) for move in moves))


def mistaken(prompt: str, random_: random.Random, unlike: str = "") -> str:
    """A solution with one wrong step, from which it goes on; another one than `unlike`."""
    problem = parsed(prompt)
    while True:
        step, error = random_.randrange(len(problem.steps)), random_.choice(ERRORS)
        written = problem.response(step, error if min(problem.totals[step:]) + error >= 0 else -error)
        if written != unlike:
            return written


class Reading:
    """Writes records of one kind; the texts lose what the tokenizer has no token for, as a teacher's context does."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = load_tokenizer(folder / "tokenizer")
        self._renderer, self._random = ContextRenderer(self._tokenizer), random.Random("reading")

    def record(self, record: dict[str, Any], kind: str, other: str) -> dict[str, Any]:
        """The record with attempts behind its prompt (`unrelated`: at the problem `other`), and what follows them."""
        prompt = record["prompt"]
        of = other if kind == "unrelated" else prompt
        wrong = mistaken(of, self._random)
        attempts = [f"{FIRST_SUCCESS}\n{parsed(of).response()}"] if kind in (*TOLD, "unrelated") else []
        attempts += [f"{FAILURE}\n{wrong}"] if kind in ("failure", "contrastive", "unrelated") else []
        right = kind in TOLD or self._random.random() >= NOISE
        response = parsed(prompt).response() if right else mistaken(prompt, self._random, unlike=wrong)
        if attempts:
            inserted = self._tokenizer.decode(self._renderer.encode([PARAGRAPH.join(attempts)])[0])
            prompt += PARAGRAPH + inserted
        return {**record, "prompt": prompt, "response": response}


def main(data: Path, out: Path) -> None:
    reading, random_ = Reading(data), random.Random("kinds")
    train, held_out = (
        [json.loads(line) for line in (data / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "heldout")
    )
    train = train * ROUNDS
    random_.shuffle(train)
    out.mkdir(parents=True, exist_ok=True)
    kinds = random_.choices(list(KINDS), list(KINDS.values()), k=len(train))
    others = [train[-1], *train[:-1]]
    lines = (reading.record(one, kind, other["prompt"]) for one, kind, other in zip(train, kinds, others, strict=True))
    write_lines(out / "reading.jsonl", lines)
    for kind in KINDS:
        pairs = zip(held_out, [held_out[-1], *held_out[:-1]], strict=True)
        write_lines(out / f"heldout_{kind}.jsonl", (reading.record(one, kind, o["prompt"]) for one, o in pairs))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
