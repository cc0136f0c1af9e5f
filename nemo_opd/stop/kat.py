"""KAT, escaping the KL agreement trap (arXiv 2606.09471): the `stop` slot's choice `kat`.

`rule.py` has the formula. This file has what surrounds it: the threshold's history, and the two forms.

    segments   the rule in the generation loop (`segments.py`): nothing is written after a cut is known
    after      rollouts are written whole, then cut: saves training and the loss's scores, not generation

Both cut the same tokens, up to the rounding of d. In both, d costs one forward of the student and one of the teacher
per token on top of the loss's own scores (in segments: per token and later segment, since contexts are read again).
Where vLLM writes, d costs none of the student: it says what is needed of it as it writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nemo_opd.config import TrapStop
from nemo_opd.engines.protocols import Generator
from nemo_opd.rollout.pieces import shortened
from nemo_opd.stop.base import StopReport
from nemo_opd.stop.divergence import Measure, Span
from nemo_opd.stop.history import History, quantile
from nemo_opd.stop.rule import TrapRule, Verdict
from nemo_opd.types import Author, Rollout

Context = tuple[int, ...] | None
"""What the teacher sees before a response; None where it is not asked."""


@dataclass(frozen=True)
class Judged:
    """A rollout before its cut, and what the rule says of it."""

    verdict: Verdict
    start: int
    """Tokens of the response before the first one that the student wrote; the rule's tokens count from there."""
    written: int
    """Tokens of the response when the rule looked last, `start` included."""
    unwritten: int = 0
    """Tokens up to the limit that a cut kept from being written, at most: some responses would have ended by EOS."""

    @property
    def kept(self) -> int:
        """Tokens of the response after the cut."""
        return self.written if self.verdict.kept is None else self.start + self.verdict.kept

    @property
    def is_cut(self) -> bool:
        return self.verdict.kept is not None


class TrapWatch:
    """Rule, history and measure together: judges the rollouts of a step by a threshold that is frozen for the step."""

    def __init__(self, slot: TrapStop, measure: Measure) -> None:
        self.rule = TrapRule(slot.window, slot.consecutive, slot.grace or slot.window, slot.stride)
        self.history = History(slot)
        self.measure = measure
        self.judged: list[Judged] = []
        """The rollouts of the step so far, ordered by (prompt, sample); the same on every rank."""

    def judge_whole(self, rollouts: Sequence[Rollout], contexts: Sequence[Context]) -> None:
        """Judge finished rollouts. Those without a teacher context are never cut. Collective."""
        starts = [first_student_token(rollout) for rollout in rollouts]
        spans = {
            number: span_of(rollout, context, start)
            for number, (rollout, context, start) in enumerate(zip(rollouts, contexts, starts, strict=True))
            if context is not None and len(rollout.response_ids) > start
        }
        found = dict(zip(spans, self.measure(list(spans.values())), strict=True))
        threshold = self.history.threshold()
        self.judged = [
            Judged(self.rule.judge(found.get(number, torch.empty(0)), threshold), start, len(rollout.response_ids))
            for number, (rollout, start) in enumerate(zip(rollouts, starts, strict=True))
        ]

    def end_step(self) -> StopReport:
        """Report on the step, then push its m: the next step's threshold."""
        discarded = sum(judged.written - judged.kept for judged in self.judged)
        report = StopReport(discarded, trap_metrics(self.judged, self.history.threshold()))
        self.history.push(judged.verdict.lowest for judged in self.judged)
        self.judged = []
        return report


def first_student_token(rollout: Rollout) -> int:
    """Length of the prefix that somebody else wrote."""
    mine = (rollout.author == Author.STUDENT).nonzero()
    return int(mine[0]) if len(mine) else len(rollout.response_ids)


def span_of(rollout: Rollout, context: tuple[int, ...], start: int) -> Span:
    """The student's tokens, after what each model read before them."""
    prefix = tuple(rollout.response_ids[:start].tolist())
    return Span(rollout.prompt.token_ids + prefix, context + prefix, rollout.response_ids[start:], rollout.best)


class Watched:
    """What stop rules have in common that judge by a `TrapWatch`: rollouts are written whole, and the rule's history
    is all that must be remembered. See `nemo_opd.stop.base.StopRule`."""

    def __init__(self, watch: TrapWatch) -> None:
        self._watch = watch

    def writer(self, generator: Generator) -> Generator:
        return generator

    def end_step(self) -> StopReport:
        return self._watch.end_step()

    def state(self) -> dict[str, Any]:
        return self._watch.history.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._watch.history.load_state(state)


class KatAfter(Watched):
    """`form: after`."""

    def cut(self, rollouts: Sequence[Rollout], contexts: Sequence[Context]) -> list[Rollout]:
        self._watch.judge_whole(rollouts, contexts)
        pairs = zip(rollouts, self._watch.judged, strict=True)
        return [shortened(rollout, j.kept) if j.is_cut else rollout for rollout, j in pairs]


def trap_metrics(judged: Sequence[Judged], threshold: float | None) -> dict[str, float]:
    """`kat/...` of a step. Token counts are over the step's rollouts; quantiles are left out where nothing was tested.

    `trigger_rate` is the share of rollouts that were cut, `tokens_saved_at_most` counts what cut rollouts did not go on
    to write up to the token limit: an upper bound, since some would have ended by EOS.
    """
    count = max(1, len(judged))
    metrics = {
        "kat/active": float(threshold is not None),
        "kat/trigger_rate": sum(j.is_cut for j in judged) / count,
        "kat/cut_to_nothing": sum(j.verdict.kept == 0 for j in judged) / count,
        "kat/tokens_written": float(sum(j.written for j in judged)),
        "kat/tokens_kept": float(sum(j.kept for j in judged)),
        "kat/tokens_discarded": float(sum(j.written - j.kept for j in judged)),
        "kat/tokens_saved_at_most": float(sum(j.unwritten for j in judged)),
    }
    if threshold is not None:
        metrics["kat/threshold"] = threshold
    lowest = sorted(j.verdict.lowest for j in judged if j.verdict.lowest is not None)
    if lowest:
        means = torch.cat([j.verdict.means for j in judged]).sort().values.tolist()
        for name, ordered in (("window", means), ("lowest_window", lowest)):
            metrics |= {f"kat/{name}_q{q}": quantile(ordered, q / 100) for q in (10, 50, 90)}
    return metrics
