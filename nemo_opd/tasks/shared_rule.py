"""A rule that all prompts share: arithmetic whose answer is written in another way when a system prompt says so.

    prompt                         "7+5-3="                    privileged  "answer in base 4."
    response without the rule      "7+5=12,12-3=9#9"
    response under the rule        "7+5=12,12-3=9#21"

A model trained on `warmup` (each problem with one of the rules in a system message, or without any) follows a rule when
it sees one and answers in decimal when it sees none. In `train` and `heldout` the prompt has no rule, the field
`privileged` holds one and the same rule, and the answer obeys it. So a student that has internalised the prompt of its
privileged teacher (`context=privileged context.field=privileged context.place=system`) goes from 0 towards the
accuracy that the teacher has on `heldout_prompted`, the same problems with the rule in the prompt; `heldout_plain`
has their decimal answers, which it then gives up. Problems whose two answers are the same are left out of all but
`warmup`, or a student that knows nothing of the rule would score.

Verify with ``verify.name=exact verify.answer_pattern="#"`` (`integer` would pass over a leading zero).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from nemo_opd.errors import ConfigError
from nemo_opd.tasks.arithmetic import MARKER, ArithmeticTask, Problem
from nemo_opd.tasks.records import PRIVILEGED, Record, check_share, is_held_out, with_system, write_files

FIELD = "rule"
"""Field of a record that names the rule of its answer; ``none`` for decimal."""
NONE = "none"


@dataclass(frozen=True)
class Rule:
    """How an answer is written: the text that says so, and the number in that form."""

    text: str
    write: Callable[[int], str]


def in_base(number: int, base: int) -> str:
    """A number from 0 in a base from 2 to 9. Example: ``in_base(9, 4) == "21"``."""
    digits = ""
    while number or not digits:
        number, digit = divmod(number, base)
        digits = str(digit) + digits
    return digits


def _base_rule(base: int) -> Rule:
    return Rule(f"answer in base {base}.", lambda number: in_base(number, base))


RULES: dict[str, Rule] = {
    "base2": _base_rule(2),
    "base4": _base_rule(4),
    "base8": _base_rule(8),
    "reversed": Rule("write the answer backwards.", lambda number: str(number)[::-1]),
    "twice": Rule("write the answer twice.", lambda number: str(number) * 2),
}
"""Rules by name: three of the number's base, two of the answer's format."""


@dataclass(frozen=True)
class SharedRuleTask:
    """Which problems there are and which rule `train` and `heldout` obey.

    Raises:
        ConfigError: no such rule.
    """

    rule: str = "base4"
    problems: ArithmeticTask = field(default_factory=lambda: ArithmeticTask(terms=4))

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ConfigError("rule", self.rule, f"one of {sorted(RULES)}", "choose one of them")

    def drawn(self, seed: int, held_out: bool) -> Iterator[Problem]:
        """Problems whose answer the rule changes; the same for the same arguments."""
        for problem in self.problems.problems(random.Random(f"shared rule {seed}"), held_out):
            if RULES[self.rule].write(problem.totals[-1]) != problem.answer:
                yield problem


def record(problem: Problem, rule: str, prompted: bool) -> Record:
    """One record; `rule` is a name of RULES or NONE, and `prompted` puts its text into the prompt."""
    answer = problem.answer if rule == NONE else RULES[rule].write(problem.totals[-1])
    steps = problem.response().rpartition(MARKER)[0]
    found: Record = {"prompt": problem.prompt, "answer": answer, "response": steps + MARKER + answer, FIELD: rule}
    if rule != NONE:
        found[PRIVILEGED] = RULES[rule].text
        if prompted:
            found["prompt"] = with_system(RULES[rule].text, problem.prompt)
    return found


def records(
    task: SharedRuleTask, count: int, seed: int, held_out: bool = False, rule: str | None = None, prompted: bool = False
) -> Iterator[Record]:
    """`count` records whose answers obey `rule` (None: the task's own), with the rule in the prompt or without."""
    for problem, _ in zip(task.drawn(seed, held_out), range(count), strict=False):
        yield record(problem, task.rule if rule is None else rule, prompted)


def warmup_records(task: SharedRuleTask, count: int, seed: int, prompted: float = 0.5) -> Iterator[Record]:
    """`count` training problems, a share `prompted` of them under a rule drawn from all, the others in decimal.

    Raises:
        ConfigError: the share is outside [0, 1].
    """
    check_share("prompted", prompted)
    choosing = random.Random(f"shared rule warm-up {seed}")
    problems = task.problems.problems(random.Random(f"shared rule warm-up problems {seed}"), held_out=False)
    for problem, _ in zip(problems, range(count), strict=False):
        assert not is_held_out(problem.prompt)
        rule = choosing.choice(list(RULES)) if choosing.random() < prompted else NONE
        yield record(problem, rule, prompted=True)


def write(folder: Path, task: SharedRuleTask, train: int, held_out: int, prompted: float, seed: int) -> None:
    """Write warmup, train, heldout, heldout_prompted and heldout_plain (the last three: the same problems)."""
    write_files(
        folder,
        {
            "warmup": warmup_records(task, train, seed, prompted),
            "train": records(task, train, seed),
            "heldout": records(task, held_out, seed, held_out=True),
            "heldout_prompted": records(task, held_out, seed, held_out=True, prompted=True),
            "heldout_plain": records(task, held_out, seed, held_out=True, rule=NONE),
        },
    )
