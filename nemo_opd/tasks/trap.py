"""Early mistakes that lead into a loop which the teacher agrees with: what terminating a rollout early is for.

A prompt is a start state and moves of a machine with ten states; the response writes every move with the state that it
leads to, and the last one as the answer. Moves add up modulo ten:

    prompt    "4:372="
    response  "4+3=7;7+7=4;4+2=6#6"

The machine has one more state. A wrong move falls into it, and from there nothing leads out: the response repeats the
same few characters for ever and no answer comes.

    trapped   "4+3=7;7+7=5;?.?.?.?.?.?.?.?."      (7+7 is 4 and not 5)

`teacher` and `student` are warm-up files of correct responses with a share of trapped ones, in which an early step is
wrong. The loop is the only continuation of a wrong state that either model has ever seen, so both learn to write it: a
student that errs runs to its token limit, and on the tokens of its loop the teacher has nothing to say against it.
Where both are certain the per-token divergence is 0, nothing is learnt, and the tokens only dilute the few early ones
where the teacher, whose file has a small share of trapped responses, disagrees with the student, whose file has a
large one. A rule that ends a rollout when its divergence stays low (KAT) saves these tokens; the controls of fixed
length and of shuffled lengths show how much of its gain is that dilution.

A loop is `loops` repetitions long before the end-of-text token that closes every written response. Keep the student's
token limit below that (`shortest_loop`), and no model sees a way out within it.

Verify with ``verify.name=integer verify.answer_pattern="#"``.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nemo_opd.errors import ConfigError
from nemo_opd.tasks.arithmetic import MARKER
from nemo_opd.tasks.records import Record, check_share, distinct, write_files

STATES = 10
LOOP = "?."
"""What the trapped machine writes, again and again."""
FIELD = "trapped_at"
"""Field of a record: the step (from 0) that is wrong; -1 where none is."""


@dataclass(frozen=True)
class TrapTask:
    """How long problems and loops are.

    Args:
        moves: steps of a problem, at least 2.
        early: a trapped response errs in one of its first `early` steps.
        loops: repetitions of LOOP that a trapped response writes.

    Raises:
        ConfigError: fewer than 2 moves, `early` outside [1, moves], or fewer than 2 loops.
    """

    moves: int = 5
    early: int = 2
    loops: int = 32

    def __post_init__(self) -> None:
        if self.moves < 2 or self.loops < 2:
            raise ConfigError("moves and loops", f"{self.moves} and {self.loops}", "at least 2 each", "raise them")
        if not 1 <= self.early <= self.moves:
            raise ConfigError("early", self.early, f"from 1 to {self.moves} moves", "choose one of these steps")

    @property
    def shortest_loop(self) -> int:
        """Characters, so tokens, of the shortest trapped response: the token limit must stay below it."""
        return len("0+0=0;") + self.loops * len(LOOP)

    def draw(self, random_: random.Random) -> str:
        """A random prompt. A move is 1 to 9: each of them changes the state."""
        moves = "".join(random_.choices("123456789", k=self.moves))
        return f"{random_.randrange(STATES)}:{moves}="

    def trapped(self, prompt: str, random_: random.Random) -> tuple[str, int]:
        """A response with one early wrong state, and the step at which it stands."""
        step = random_.randrange(self.early)
        *right, last = steps(prompt)[: step + 1]
        wrong = (int(last[-1]) + random_.randrange(1, STATES)) % STATES
        return "".join(f"{text};" for text in (*right, f"{last[:-1]}{wrong}")) + LOOP * self.loops, step


def states(prompt: str) -> tuple[int, ...]:
    """The state after each move. Example: ``states("4:372=") == (7, 4, 6)``."""
    start, _, moves = prompt.rstrip("=").partition(":")
    return tuple(total % STATES for total in itertools.accumulate(map(int, moves), initial=int(start)))[1:]


def steps(prompt: str) -> list[str]:
    """Every move as it is written. Example: ``steps("4:372=") == ["4+3=7", "7+7=4", "4+2=6"]``."""
    start, _, moves = prompt.rstrip("=").partition(":")
    right = states(prompt)
    return [
        f"{before}+{move}={after}" for before, move, after in zip((int(start), *right[:-1]), moves, right, strict=True)
    ]


def response(prompt: str) -> str:
    """The correct one."""
    return ";".join(steps(prompt)) + f"{MARKER}{states(prompt)[-1]}"


def records(task: TrapTask, count: int, seed: int, held_out: bool = False, trapped: float = 0.0) -> Iterator[Record]:
    """`count` records, the same for the same arguments; train and held-out prompts are disjoint for any seeds.

    Args:
        trapped: share of the responses that fall into the loop; `answer` is the true one in all.

    Raises:
        ConfigError: the share is outside [0, 1], or fewer than `count` prompts exist.
    """
    check_share("trapped", trapped)
    drawing, faults = random.Random(f"trap {seed}"), random.Random(f"trap faults {seed}")
    prompts = distinct(lambda: task.draw(drawing), held_out, str)
    for prompt, _ in zip(prompts, range(count), strict=False):
        falls = faults.random() < trapped
        text, step = task.trapped(prompt, faults) if falls else (response(prompt), -1)
        yield {"prompt": prompt, "answer": str(states(prompt)[-1]), "response": text, FIELD: step}


def write(
    folder: Path, task: TrapTask, train: int, held_out: int, teacher_trapped: float, student_trapped: float, seed: int
) -> None:
    """Write teacher and student (the same problems, to warm the two models up), train and heldout."""
    write_files(
        folder,
        {
            "teacher": records(task, train, seed, trapped=teacher_trapped),
            "student": records(task, train, seed, trapped=student_trapped),
            "train": records(task, train, seed),
            "heldout": records(task, held_out, seed, held_out=True),
        },
    )
