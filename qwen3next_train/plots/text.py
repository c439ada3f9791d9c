"""Curves and maps as lines of text, for a terminal; needs no library."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qwen3next_train.metrics.step_line import format_si
from qwen3next_train.plots.panels import BALANCE_TITLE, BalanceMap, Curve, DrawnPanel
from qwen3next_train.plots.runs import Axis, Floats

_HEIGHT = 12
_LABEL = 10
_NARROWEST = 20
_MARKS = "*o+x#@%&"
_SHADES = " .:-=+*#%@"
_MARK_OF_A_RESUME = "^"


def text_panel(drawn: DrawnPanel, *, axis: Axis, width: int, resumes: Sequence[float]) -> list[str]:
    """One panel: title, canvas with its limits, axis, and a line for each curve.

    Args:
        drawn: what to draw.
        axis: what is to the right.
        width: columns in all.
        resumes: where runs were resumed, on the axis.
    """
    curves = drawn.curves
    columns = max(width - _LABEL - 2, _NARROWEST)
    finite = np.concatenate([curve.shown[np.isfinite(curve.shown)] for curve in curves])
    is_log = drawn.panel.is_log and bool((finite > 0).all())
    left, right = _limits(np.concatenate([curve.x for curve in curves]))
    means = [
        _by_column(curve, np.log(curve.shown) if is_log else curve.shown, left, right, columns) for curve in curves
    ]
    # Of what is drawn: single values are lost in the means of their columns.
    low, high = _limits(np.concatenate([values[np.isfinite(values)] for values in means]))
    canvas = np.full((_HEIGHT, columns), " ")
    for number, values in enumerate(means):
        for column in np.flatnonzero(np.isfinite(values)):
            row = round((high - values[column]) / (high - low) * (_HEIGHT - 1))
            canvas[row, column] = _MARKS[number % len(_MARKS)]
    top, bottom = (f"{np.exp(value) if is_log else value:.4g}" for value in (high, low))
    labels = [top, *[""] * (_HEIGHT - 2), bottom]
    lines = [f"{drawn.panel.title}{' (log)' if is_log else ''}"]
    lines += [f"{label:>{_LABEL}} |{''.join(row)}".rstrip() for label, row in zip(labels, canvas, strict=True)]
    lines += _bottom(axis, left, right, columns, resumes)
    for number, curve in enumerate(curves):
        last = curve.shown[np.isfinite(curve.shown)][-1]
        lines.append(f"{_MARKS[number % len(_MARKS)]:>{_LABEL}}  {curve.label}, last {last:.4g}")
    return lines


def text_map(balance: BalanceMap, *, axis: Axis, width: int) -> list[str]:
    """One map: a line for each layer, the darker the fuller its fullest expert, and what the shades mean."""
    columns = max(width - _LABEL - 2, _NARROWEST)
    left, right = _limits(balance.x)
    values = balance.values_LC[np.isfinite(balance.values_LC)]
    low, high = _limits(values)
    lines = [f"experts of {balance.run}: {BALANCE_TITLE}"]
    for layer, values_C in zip(balance.layers, balance.values_LC, strict=True):
        curve = Curve("", 0, balance.x, values_C, None)
        shades = _by_column(curve, values_C, left, right, columns)
        text = "".join(_shade(value, low, high) for value in shades)
        lines.append(f"{f'layer {layer}':>{_LABEL}} |{text}".rstrip())
    lines += _bottom(axis, left, right, columns, ())
    return [*lines, f"{'':>{_LABEL}}  '{_SHADES[0]}' {low:.4g} to '{_SHADES[-1]}' {high:.4g}"]


def _by_column(curve: Curve, values: Floats, left: float, right: float, columns: int) -> Floats:
    """The curve's mean in each column, in between the line from one point to the next; NaN outside."""
    finite = np.isfinite(values)
    places = np.rint((curve.x[finite] - left) / (right - left) * (columns - 1)).astype(int)
    counts = np.bincount(places, minlength=columns)
    means = np.bincount(places, weights=values[finite], minlength=columns) / np.maximum(counts, 1)
    filled = np.flatnonzero(counts)
    return np.interp(np.arange(columns), filled, means[filled], left=np.nan, right=np.nan)


def _bottom(axis: Axis, left: float, right: float, columns: int, resumes: Sequence[float]) -> list[str]:
    rule = ["-"] * columns
    resumes = [place for place in resumes if left <= place <= right]
    for place in resumes:
        rule[round((place - left) / (right - left) * (columns - 1))] = _MARK_OF_A_RESUME
    # Whole up to what a step number has, else as people read counts of tokens.
    first, last = (f"{value:.0f}" if value < 1e8 else format_si(value).strip() for value in (left, right))
    ends = f"{first}{f'{last} {axis}':>{columns - len(first)}}"
    lines = [f"{'':>{_LABEL}} +{''.join(rule)}", f"{'':>{_LABEL}}  {ends}"]
    return [*lines, f"{_MARK_OF_A_RESUME:>{_LABEL}}  resumed"] if resumes else lines


def _limits(values: Floats) -> tuple[float, float]:
    """Least and largest, never the same."""
    low, high = float(values.min()), float(values.max())
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def _shade(value: float, low: float, high: float) -> str:
    if not np.isfinite(value):
        return "?"
    return _SHADES[round((value - low) / (high - low) * (len(_SHADES) - 1))]
