"""Named places where a run can be made to break, so that what is promised about breaking can be tested.

    NEMO_OPD_FAULTS="ckpt.before_manifest=kill"            whoever comes by first
    NEMO_OPD_FAULTS="step.trained=kill@7 rank=1"           the seventh time that rank 1 comes by
    NEMO_OPD_FAULTS="ckpt.before_rename=sleep:5; refit.between_tensors=raise"
    NEMO_OPD_FAULTS="train.gradient=nan@3 rank=1"          its numbers become what they should not be

Several rules are separated by semicolons. Without the variable a place costs the test of an empty dictionary.
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
import re
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass

VARIABLE = "NEMO_OPD_FAULTS"

POINTS: dict[str, str] = {
    "ckpt.before_shard": "a process is about to write its first file of a checkpoint",
    "ckpt.between_shards": "it has written one, hashed and synced",
    "ckpt.before_manifest": "every process has written its files",
    "ckpt.before_rename": "the manifest is written, the folder is still a temporary one",
    "ckpt.replacing": "an older checkpoint of the same step has made room, the new one does not stand yet",
    "ckpt.after_rename": "the checkpoint is committed, older ones are not removed yet",
    "ckpt.during_deletion": "before each part of a folder that is being deleted",
    "step.rollout": "in a step, where a rank begins to write its share of the rollouts",
    "step.score": "in a step, before the teacher is asked",
    "step.trained": "in a step, after the update and before anything of the step is recorded or saved",
    "train.gradient": "in the train step, when a rank has its own gradient and nothing is added up yet",
}
"""Every place, and where it is. A test asks that each stands in the code once and in a test at least once."""

_RULE = re.compile(r"(?P<point>[\w.]+)=(?P<action>kill|freeze|raise|enospc|nan|(sleep|hold|times):(?P<number>[\d.e]+))"
                   r"(@(?P<nth>\d+))?( rank=(?P<rank>\d+))?")  # fmt: skip


class InjectedFault(RuntimeError):
    """What action ``raise`` raises."""


@dataclass
class Rule:
    """What happens at a place."""

    action: str
    """kill (SIGKILL), freeze (SIGSTOP), raise, enospc (a full disk), sleep, hold (sleep with the interpreter's lock,
    so that no other thread runs), nan or times"""
    number: float = 0.0
    """Seconds of sleep and hold, factor of times."""
    nth: int = 1
    """It happens the nth time that the place is come by, and no other; sleep from then on every time."""
    rank: int | None = None
    """Only in this process of the run; None: in all."""
    passed: int = 0


def parse(text: str) -> dict[str, Rule]:
    """The rules of the variable. Raises ValueError for what is none, or of an unknown place."""
    rules = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        found = _RULE.fullmatch(part)
        if found is None or found["point"] not in POINTS:
            raise ValueError(
                f"{VARIABLE}: got {part!r}; expected POINT=kill|freeze|raise|enospc|sleep:SECONDS|hold:SECONDS|nan|"
                f"times:F, then @N and rank=R if you like, with a point of {', '.join(POINTS)}"
            )
        rank = None if found["rank"] is None else int(found["rank"])
        action = found["action"].partition(":")[0]
        rules[found["point"]] = Rule(action, float(found["number"] or 0), int(found["nth"] or 1), rank)
    return rules


_armed = parse(os.environ.get(VARIABLE, ""))


def arm(text: str) -> None:
    """Replace the rules of this process, as a test does that shares it with others; ``""`` ends them."""
    global _armed
    _armed = parse(text)


def hit(point: str) -> float:
    """Come by a place: nothing, unless a rule names it. A place that has numbers multiplies them by what it gets."""
    if _armed and point in _armed:
        return _strike(point, _armed[point], os.environ)
    return 1.0


def _strike(point: str, rule: Rule, environment: Mapping[str, str]) -> float:
    if rule.rank is not None and rule.rank != int(environment.get("RANK", "0")):
        return 1.0
    rule.passed += 1
    if rule.action == "sleep" and rule.passed >= rule.nth:
        time.sleep(rule.number)
    elif rule.passed == rule.nth:
        if rule.action in ("nan", "times"):
            return math.nan if rule.action == "nan" else rule.number
        if rule.action == "hold":
            ctypes.PyDLL(None).usleep(int(rule.number * 1e6))
            return 1.0
        if rule.action == "raise":
            raise InjectedFault(f"injected at {point}")
        if rule.action == "enospc":
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} (injected at {point})")
        os.kill(os.getpid(), signal.SIGKILL if rule.action == "kill" else signal.SIGSTOP)
    return 1.0
