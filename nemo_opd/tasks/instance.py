"""A map that cannot be learnt: every prompt has an answer drawn at random, and only privileged information tells it.

    prompt    "482913?"       response  "#7"       privileged  "the answer is 7."

The answer is a keyed hash of prompt and seed, so a prompt has one answer, no feature of it predicts that answer, and a
held-out prompt says nothing at all about its own. A model trained on `warmup` (a share of the prompts with the
information in a system message, the others without) copies the answer when it is told and spreads over all answers
when it is not. Distilled from itself with the information in the prompt (`context=privileged context.field=privileged
context.place=system`), it can only average its teachers: held-out accuracy stays at 1 / answers, and for a teacher
that is certain the forward KL at the answer's token does not fall below ln(answers) nats (`plateau`), while the loss of
the shared-rule task goes down. Training on few prompts for many epochs would memorise the map; write enough of them.

Verify with ``verify.name=exact verify.answer_pattern="#"``.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nemo_opd.errors import ConfigError
from nemo_opd.tasks.arithmetic import MARKER
from nemo_opd.tasks.records import PRIVILEGED, Record, check_share, distinct, with_system, write_files


@dataclass(frozen=True)
class InstanceTask:
    """How many answers there are, and how many digits a prompt has.

    Raises:
        ConfigError: other than 2 to 10 answers, or fewer than 1 digit.
    """

    answers: int = 10
    digits: int = 6

    def __post_init__(self) -> None:
        if not 2 <= self.answers <= 10:
            raise ConfigError("answers", self.answers, "2 to 10, one digit each", "choose one of them")
        if self.digits < 1:
            raise ConfigError("digits", self.digits, "at least 1", "raise it")

    @property
    def plateau(self) -> float:
        """Nats of the answer's uncertainty, below which no student that is not told can come (forward KL)."""
        return math.log(self.answers)

    def answer(self, prompt: str, seed: int) -> str:
        """The answer of a prompt under a seed, each equally likely."""
        digest = hashlib.blake2b(prompt.encode(), key=f"instance {seed}".encode(), digest_size=8).digest()
        return str(int.from_bytes(digest, "big") % self.answers)

    def draw(self, random_: random.Random) -> str:
        """A random prompt."""
        return "".join(random_.choices("0123456789", k=self.digits)) + "?"


def records(
    task: InstanceTask, count: int, seed: int, held_out: bool = False, prompted: float = 0.0
) -> Iterator[Record]:
    """`count` records, the same for the same arguments; train and held-out prompts are disjoint for any seeds.

    Args:
        prompted: share of the records with the information in the prompt too.

    Raises:
        ConfigError: the share is outside [0, 1], or fewer than `count` prompts exist.
    """
    check_share("prompted", prompted)
    drawing, choosing = random.Random(f"instance {seed}"), random.Random(f"instance prompted {seed}")
    prompts = distinct(lambda: task.draw(drawing), held_out, str)
    for prompt, _ in zip(prompts, range(count), strict=False):
        answer = task.answer(prompt, seed)
        told = f"the answer is {answer}."
        shown = with_system(told, prompt) if choosing.random() < prompted else prompt
        yield {"prompt": shown, "answer": answer, "response": MARKER + answer, PRIVILEGED: told}


def write(folder: Path, task: InstanceTask, train: int, held_out: int, prompted: float, seed: int) -> None:
    """Write warmup, train, heldout and heldout_prompted (the last two: the same problems).

    `warmup` has other answers than `train`, so that nothing of the map is learnt before it is distilled.
    """
    write_files(
        folder,
        {
            "warmup": records(task, train, seed + 1, prompted=prompted),
            "train": records(task, train, seed),
            "heldout": records(task, held_out, seed, held_out=True),
            "heldout_prompted": records(task, held_out, seed, held_out=True, prompted=1.0),
        },
    )
