"""Problems as a model reads them that is shown other attempts, in the very layout of `context: peers`.

    python recipes/reproductions/peer_conditioned/reading_data.py DATA OUT

DATA is a folder of `nemo-opd data arithmetic`. Into OUT comes `reading.jsonl`, for SFT: problems alone, with a success,
a failure or both, or with a success and a failure of another problem. Each problem has one mistake: the first step that
adds or subtracts 5 or more comes out one too high. Without attempts at this problem what follows is the mistake more
often than not, so that a model which learns this is surer of what is wrong than of what is right. With them what
follows is what their labels say: the text of a success, or the other one of a failure. In LIES of the records they lie,
or a model would learn to be right wherever it sees attempts, whatever stands in them. `heldout_KIND.jsonl` are held-out
problems, without lies, which say how well a model reads.
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

KINDS = {"alone": 0.25, "success": 0.2, "contrastive": 0.25, "failure": 0.15, "unrelated": 0.15}
"""Shares of reading.jsonl."""
ROUNDS = 8
"""How often each problem stands there, with other attempts."""
LEAST = 5
"""Operand from which on a step goes wrong."""
LIES = 0.4
"""Share of the records with attempts at their problem that show the mistake as a success."""
MISTAKES = 0.65
"""Share of such problems that go wrong where no attempt at them is shown."""


def parsed(prompt: str) -> Problem:
    first, *moves = re.findall(r"(?:^|[+-])\d+", prompt.rstrip("="))
    return Problem(int(first), tuple((move[0], int(move[1:])) for move in moves))


def slip(problem: Problem) -> int | None:
    """The step of the problem's mistake."""
    return next((n for n, (_, operand) in enumerate(problem.steps) if operand >= LEAST), None)


def mistaken(problem: Problem) -> str:
    """The problem's mistake; of one that has none, a last step that is one too high."""
    step = slip(problem)
    return problem.response(len(problem.steps) - 1 if step is None else step, error=1)


class Reading:
    """Writes records of one kind; the texts lose what the tokenizer has no token for, as a teacher's context does."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = load_tokenizer(folder / "tokenizer")
        self._renderer, self._random = ContextRenderer(self._tokenizer), random.Random("reading")

    def record(self, record: dict[str, Any], kind: str, other: str, lies: float = 0.0) -> dict[str, Any]:
        """The record with attempts behind its prompt (`unrelated`: at the problem `other`), and what follows them."""
        prompt, problem = record["prompt"], parsed(record["prompt"])
        shown = parsed(other) if kind == "unrelated" else problem
        good, bad = shown.response(), mistaken(shown)
        if kind not in ("alone", "unrelated") and self._random.random() < lies:
            good, bad = bad, good
        attempts = [f"{FIRST_SUCCESS}\n{good}"] if kind in ("success", "contrastive", "unrelated") else []
        attempts += [f"{FAILURE}\n{bad}"] if kind in ("failure", "contrastive", "unrelated") else []
        if kind in ("alone", "unrelated"):
            wrong = slip(problem) is not None and self._random.random() < MISTAKES
            good = mistaken(problem) if wrong else problem.response()
        if attempts:
            inserted = self._tokenizer.decode(self._renderer.encode([PARAGRAPH.join(attempts)])[0])
            prompt += PARAGRAPH + inserted
        return {**record, "prompt": prompt, "response": good}


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
    rows = zip(train, kinds, [train[-1], *train[:-1]], strict=True)
    lines = (reading.record(one, kind, other["prompt"], LIES) for one, kind, other in rows)
    write_lines(out / "reading.jsonl", lines)
    for kind in KINDS:
        pairs = zip(held_out, [held_out[-1], *held_out[:-1]], strict=True)
        write_lines(out / f"heldout_{kind}.jsonl", (reading.record(one, kind, o["prompt"]) for one, o in pairs))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
