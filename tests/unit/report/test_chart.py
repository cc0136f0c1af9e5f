"""Curves as SVG."""

from __future__ import annotations

import math

import pytest

from nemo_opd.report.chart import (
    HEIGHT,
    LEFT,
    MOST_POINTS,
    RIGHT,
    WIDTH,
    Axis,
    Line,
    chart,
    path,
    smoothed,
    thin,
    ticks,
)


def test_a_curve_spans_the_chart_from_corner_to_corner():
    x, y = Axis(0, 10, LEFT, WIDTH - RIGHT), Axis(0.0, 1.0, 100.0, 0.0)
    assert path(Line(0, [0, 5, 10], [0.0, 0.5, 1.0]), x, y) == f"M{LEFT:.1f} 100.0L211.0 50.0L{WIDTH - RIGHT:.1f} 0.0"


def test_a_missing_value_interrupts_the_curve():
    axis = Axis(0, 4, 0, 4)
    assert path(Line(0, [0, 1, 2, 3], [0.0, None, 2.0, 3.0]), axis, axis) == "M0.0 0.0M2.0 2.0L3.0 3.0"


def test_long_runs_are_averaged_without_what_is_no_number():
    points = [(step, math.nan if step % 10 == 0 else 2.0) for step in range(1, 5 * MOST_POINTS + 1)]
    line = thin(3, points)
    assert (line.run, len(line.steps), set(line.values)) == (3, MOST_POINTS, {2.0})
    assert thin(0, [(1, math.inf)]).values == [None]


@pytest.mark.parametrize(
    ("low", "high", "log", "expected"),
    [
        (0.0, 1.0, False, [0.0, 0.5, 1.0]),
        (-3.0, 9.0, False, [0.0, 5.0]),
        (0.0012, 0.0019, False, [0.0012, 0.0014, 0.0016, 0.0018]),
        (0.001, 10.0, True, [0.001, 0.01, 0.1, 1.0, 10.0]),
        (1e-9, 1.0, True, [1e-9, 1e-7, 1e-5, 1e-3, 0.1]),
    ],
)
def test_ticks_are_few_and_round(low, high, log, expected):
    assert ticks(Axis(low, high, 0, 1, log)) == pytest.approx(expected)


def test_values_over_several_powers_of_ten_get_a_logarithmic_axis():
    wide, narrow = ([Line(0, [1, 2, 3], values)] for values in ([1e-3, 1e-2, 10.0], [1.0, 2.0, 3.0]))
    assert "<small>log</small>" in chart("x", wide) and "<small>log</small>" not in chart("x", narrow)
    assert f" {HEIGHT - 22:.1f}L" in chart("x", wide).replace("M52.0", "")


@pytest.mark.parametrize("values", [[], [None], [1.0], [0.0, 0.0], [-5.0, -5.0], [None, None]])
def test_curves_with_little_in_them_are_drawn_too(values):
    text = chart("x", [Line(0, list(range(len(values))), values)])
    assert text.startswith("<figure") and "nan" not in text


def test_smoothing_keeps_gaps_and_means():
    values = [float(i % 2) for i in range(200)]
    values[50] = None
    smooth = smoothed(values)
    assert smooth[50] is None
    assert all(0.2 < value < 0.8 for value in smooth if value is not None)
