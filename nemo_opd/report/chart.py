"""A curve chart as static SVG: it needs no script, and nothing of it comes from anywhere else."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 380, 190
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 8, 22
MOST_POINTS = 400
"""Points of a drawn curve; more steps are averaged."""
SMOOTHED_FROM = 60
"""Points from which a smoothed curve is drawn over the raw one."""
LOG_FROM = 100.0
"""Ratio of largest to smallest value from which the axis is logarithmic."""
COLOURS = 8
"""Runs are told apart by so many colours, and then by dashes."""


@dataclass(frozen=True)
class Line:
    """One run's curve."""

    run: int
    steps: Sequence[int]
    values: Sequence[float | None]
    """None where there is no number: a gap."""


@dataclass(frozen=True)
class Axis:
    """Numbers -> pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.end - self.start)


def thin(run: int, points: Sequence[tuple[int, float]]) -> Line:
    """A curve of at most `MOST_POINTS` points; what is not finite is left out of the averages."""
    size = max(1, math.ceil(len(points) / MOST_POINTS))
    steps, values = [], []
    for i in range(0, len(points), size):
        bucket = points[i : i + size]
        numbers = [value for _, value in bucket if math.isfinite(value)]
        steps.append(bucket[len(bucket) // 2][0])
        values.append(sum(numbers) / len(numbers) if numbers else None)
    return Line(run, steps, values)


def chart(name: str, lines: Sequence[Line]) -> str:
    """A figure with one curve per run. `name` may hold anything."""
    x, y = _axes(lines)
    title = html.escape(name)
    parts = [f'<figure data-metric="{title}" data-first="{x.low:g}" data-last="{x.high:g}">']
    parts.append(f"<figcaption>{title}{' <small>log</small>' if y.log else ''}</figcaption>")
    parts.append(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title} over steps">')
    for value in ticks(y):
        at = y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 5}" y="{at + 3.5:.1f}" text-anchor="end">{value:.3g}</text>')
    for step, anchor in ((x.low, "start"), (x.high, "end")):
        parts.append(f'<text class="tick" x="{x(step):.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{step:g}</text>')
    for line in lines:
        parts += _curve(line, x, y)
    parts.append(f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" x1="-9" x2="-9"/></svg>')
    parts.append('<p class="readout"></p></figure>')
    return "".join(parts)


def _axes(lines: Sequence[Line]) -> tuple[Axis, Axis]:
    steps = [step for line in lines for step in line.steps] or [0]
    values = [value for line in lines for value in line.values if value is not None] or [0.0]
    low, high = min(values), max(values)
    log = low > 0 and high / low >= LOG_FROM
    if low == high:
        low, high = low - max(abs(low), 1.0) * 0.1, high + max(abs(high), 1.0) * 0.1
    first, last = min(steps), max(steps)
    return (
        Axis(first, last if last > first else first + 1, LEFT, WIDTH - RIGHT),
        Axis(low, high, HEIGHT - BOTTOM, TOP, log),
    )


def ticks(axis: Axis) -> list[float]:
    """A few round numbers within an axis."""
    if axis.log:
        low, high = math.ceil(math.log10(axis.low) - 1e-9), math.floor(math.log10(axis.high) + 1e-9)
        stride = max(1, math.ceil((high - low + 1) / 5))
        return [10.0**exponent for exponent in range(low, high + 1, stride)]
    rough = (axis.high - axis.low) / 4
    unit = 10.0 ** math.floor(math.log10(rough))
    width = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    first = math.ceil(axis.low / width)
    return [i * width for i in range(first, first + 8) if i * width <= axis.high]


def _curve(line: Line, x: Axis, y: Axis) -> list[str]:
    look = f"run{line.run % COLOURS}{' dashed' if line.run >= COLOURS else ''}"
    known = [(step, value) for step, value in zip(line.steps, line.values, strict=True) if value is not None]
    if len(known) == 1:
        return [f'<circle class="{look}" cx="{x(known[0][0]):.1f}" cy="{y(known[0][1]):.1f}" r="2.5"/>']
    if len(known) < SMOOTHED_FROM:
        return [f'<path class="{look}" d="{path(line, x, y)}"/>']
    smooth = Line(line.run, line.steps, smoothed(line.values))
    return [f'<path class="{look} raw" d="{path(line, x, y)}"/>', f'<path class="{look}" d="{path(smooth, x, y)}"/>']


def path(line: Line, x: Axis, y: Axis) -> str:
    """SVG path data; a value that is none interrupts the curve."""
    pieces, pen = [], "M"
    for step, value in zip(line.steps, line.values, strict=True):
        if value is None:
            pen = "M"
            continue
        pieces.append(f"{pen}{x(step):.1f} {y(value):.1f}")
        pen = "L"
    return "".join(pieces)


def smoothed(values: Sequence[float | None]) -> list[float | None]:
    """Centred moving average over a thirtieth of the curve; gaps stay gaps."""
    reach = len(values) // 60
    result: list[float | None] = []
    for i, value in enumerate(values):
        near = [v for v in values[max(0, i - reach) : i + reach + 1] if v is not None]
        result.append(None if value is None else sum(near) / len(near))
    return result
