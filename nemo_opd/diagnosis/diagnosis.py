"""Looks at every step's metrics and says which signs of failure there are, what helps, and whether to stop."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_opd.config import DiagnoseConfig, SignConfig
from nemo_opd.diagnosis.history import History
from nemo_opd.diagnosis.rules import WATCHED, Measured
from nemo_opd.diagnosis.signs import SIGNS, Sign

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finding:
    """A sign that holds at a step."""

    sign: str
    step: int
    since: int
    """First step from which it has held without a break."""
    value: float
    threshold: float
    action: str
    """warn or stop"""
    message: str
    advice: str

    def __str__(self) -> str:
        return (
            f"{self.sign} since step {self.since}: {self.message} ({self.value:.3g}, threshold {self.threshold:g}). "
            f"What helps: {self.advice}. diagnose.{self.sign}.action=ignore silences this"
        )


@dataclass(frozen=True)
class Verdict:
    """What there is to say of a step."""

    metrics: Mapping[str, float]
    """``diagnosis/<sign>``: steps since the start of the run at which the sign held, for each that could be judged."""
    said: tuple[Finding, ...] = ()
    """Findings that are worth saying again now."""
    stop: Finding | None = None
    """The first finding that ends the run."""


class Diagnosis:
    """The signs of one run.

    Args:
        config: thresholds, actions and windows.
        state: where windows and counts are kept: a part of the run's state, filled in place, plain JSON data.
    """

    def __init__(self, config: DiagnoseConfig, state: dict[str, Any]) -> None:
        self._config = config
        self._history = History(state, config.window, config.start_steps)
        self._held: dict[str, int] = state.setdefault("held", {})
        self._since: dict[str, int] = state.setdefault("since", {})
        self._said: dict[str, int] = state.setdefault("said", {})

    def look(self, step: int, metrics: Mapping[str, float]) -> Verdict:
        """Take in one step and judge it. A function of the metrics so far alone; logs what is said."""
        self._history.add({name: value for name, value in metrics.items() if name in WATCHED})
        findings = []
        for sign in SIGNS.values():
            settings: SignConfig = getattr(self._config, sign.name)
            measured = self._measure(sign, settings, step)
            if measured is None or not measured.trips:
                self._since.pop(sign.name, None)
                continue
            self._held[sign.name] += 1
            since = self._since.setdefault(sign.name, step)
            action = "warn" if settings.action == "stop" and not self._config.stop else settings.action
            findings.append(
                Finding(sign.name, step, since, measured.value, settings.threshold, action, measured.text, sign.advice)
            )
        said = tuple(finding for finding in findings if self._is_news(finding))
        for finding in said:
            self._said[finding.sign] = step
            log.warning("diagnosis, step %d: %s", step, finding)
        counts = {f"diagnosis/{name}": float(count) for name, count in self._held.items()}
        return Verdict(counts, said, next((finding for finding in findings if finding.action == "stop"), None))

    def _measure(self, sign: Sign, settings: SignConfig, step: int) -> Measured | None:
        if settings.action == "ignore" or (sign.from_start and step < self._config.warmup_steps):
            return None
        measured = sign.rule(self._history, settings.threshold)
        if measured is not None:
            self._held.setdefault(sign.name, 0)
        return measured

    def _is_news(self, finding: Finding) -> bool:
        """Said once, then at most every so many steps; what ends the run is always said."""
        last = self._said.get(finding.sign)
        return finding.action == "stop" or last is None or finding.step >= last + self._config.repeat_every
