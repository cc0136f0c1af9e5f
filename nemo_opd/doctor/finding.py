"""What a check found, and the table of all findings."""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any


class Verdict(enum.StrEnum):
    """`fail`: a run would fail, or its numbers would not mean what they say."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    SKIPPED = "skipped"


Value = float | int | str | None
"""A number, or the little that a person reads in its place."""


@dataclass(frozen=True)
class Finding:
    """One row of the table.

    Example: ``Finding("generator: KL to the trainer", Verdict.OK, 3e-9, "at most 1e-06")``.
    """

    name: str
    """``subject: what was looked at``"""
    verdict: Verdict
    found: Value
    bound: str = ""
    """What was expected of it."""
    way_out: str = ""
    """What the user can do now; of findings that are not `ok`."""

    def to_json(self) -> str:
        return json.dumps(_plain(asdict(self)))

    @classmethod
    def from_json(cls, text: str) -> Finding:
        fields = json.loads(text)
        return cls(**{**fields, "verdict": Verdict(fields["verdict"])})


def at_most(
    name: str, found: float, bound: float, way_out: str, above: Verdict = Verdict.FAIL, better: float | None = None
) -> Finding:
    """`above` where the number is not at most `bound` (NaN is not), and a warning where it is not at most `better`."""
    expected, verdict = f"at most {bound:g}", Verdict.OK if found <= bound else above
    if better is not None:
        expected = f"{expected}, better {better:.2g}"
        verdict = Verdict.WARN if better < found <= bound else verdict
    return Finding(name, verdict, found, expected, way_out if verdict is not Verdict.OK else "")


def at_least(name: str, found: float, bound: float, way_out: str, below: Verdict = Verdict.FAIL) -> Finding:
    """`below` where the number is not at least `bound`: NaN is not."""
    verdict = Verdict.OK if found >= bound else below
    return Finding(name, verdict, found, f"at least {bound:g}", way_out if verdict is not Verdict.OK else "")


def failed(findings: Iterable[Finding]) -> bool:
    """Is a finding among them with which no run should start?"""
    return any(finding.verdict is Verdict.FAIL for finding in findings)


def table(findings: Sequence[Finding]) -> str:
    """Rows of verdict, name, what was found and its bound; what to do about a row stands below it."""
    rows = [("verdict", "check", "found", "bound")]
    rows += [(one.verdict.value, one.name, text(one.found), one.bound) for one in findings]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = []
    for number, row in enumerate(rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append("  ".join([*cells, row[3]]).rstrip())
        if number and findings[number - 1].way_out:
            lines.append(f"{'':{widths[0]}}  -> {findings[number - 1].way_out}")
    return "\n".join([*lines, "", summary(findings)])


def summary(findings: Sequence[Finding]) -> str:
    """The last line: how many of each verdict."""
    counts = {verdict: sum(one.verdict is verdict for one in findings) for verdict in Verdict}
    return ", ".join(f"{count} {verdict.value}" for verdict, count in counts.items() if count)


def text(value: Value) -> str:
    """A number with as many digits as it deserves."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return "" if value is None else str(value)


def as_json(findings: Sequence[Finding]) -> str:
    """One JSON object with all findings; numbers that are not finite are texts, as JSON has none."""
    document = {"failed": failed(findings), "findings": [_plain(asdict(one)) for one in findings]}
    return json.dumps(document, indent=1)


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    found = fields["found"]
    return {**fields, "found": str(found) if isinstance(found, float) and not math.isfinite(found) else found}
