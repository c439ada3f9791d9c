"""Curves and maps as a picture, by matplotlib, which is imported here and nowhere else."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from qwen3next_train.plots.panels import BALANCE_TITLE, BalanceMap, DrawnPanel
from qwen3next_train.plots.runs import Axis, LoggedRun

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

_WIDTH_IN = 6.0
_HEIGHT_IN = 3.4
_DOTS_PER_INCH = 120
_RAW_ALPHA = 0.25
_MOST_MARKED = 60
"""Points of a curve that are marked one by one; a longer curve is a line."""
_MOST_NAMED_INSIDE = 8
"""Curves of a panel whose names fit into it; the names of more stand once, below all panels."""
_MOST_IN_A_ROW = 6
_NAME_HEIGHT_IN = 0.2
_STROKE_WIDTH_IN = 0.6
"""Of a name's sample of its curve, with what is left free around both."""
_LETTER_WIDTH_IN = 0.075


def draw_figure(
    panels: Sequence[DrawnPanel], maps: Sequence[BalanceMap], runs: Sequence[LoggedRun], axis: Axis
) -> Figure:
    """One picture: the panels in two columns, then the maps; runs keep their colour in all of them.

    A curve's id in an SVG file is its label; a resume is a dashed line of the run's colour. After ten runs colours
    begin anew with another stroke.
    """
    # Neither pyplot nor a backend: they hold figures and windows for whoever works interactively.
    from matplotlib.figure import Figure

    total = len(panels) + len(maps)
    num_rows = (total + 1) // 2
    crowded = [drawn for drawn in panels if len(drawn.curves) > _MOST_NAMED_INSIDE]
    names = list(dict.fromkeys(curve.label for drawn in crowded for curve in drawn.curves))
    in_a_row = _names_in_a_row(names)
    height_in = num_rows * _HEIGHT_IN + -(-len(names) // in_a_row) * _NAME_HEIGHT_IN
    figure = Figure(figsize=(2 * _WIDTH_IN, height_in), layout="constrained", dpi=_DOTS_PER_INCH)
    places = [figure.add_subplot(num_rows, 2, place + 1) for place in range(total)]
    for axes, drawn in zip(places, panels, strict=False):
        _draw_panel(axes, drawn, runs, axis)
    if names:
        _add_legend(figure.legend, places, names, loc="outside lower center", ncols=in_a_row)
    # One scale, or runs could not be compared; 0 is balanced.
    fullest = max((float(np.nanmax(balance.values_LC)) for balance in maps), default=0.0)
    for axes, balance in zip(places[len(panels) :], maps, strict=True):
        _draw_map(figure, axes, balance, axis, fullest)
    return figure


def render(figure: Figure, kind: Literal["png", "svg"]) -> bytes:
    """The picture as a file's content, the same bytes for the same numbers."""
    from matplotlib import rc_context

    target = io.BytesIO()
    # Text stays text: it can be searched, and the file is smaller.
    with rc_context({"svg.hashsalt": "qwen3next-train", "svg.fonttype": "none"}):
        figure.savefig(target, format=kind, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return target.getvalue()


def _draw_panel(axes: Axes, drawn: DrawnPanel, runs: Sequence[LoggedRun], axis: Axis) -> None:
    is_named = (len(drawn.curves) > 1 or len(runs) > 1) and len(drawn.curves) <= _MOST_NAMED_INSIDE
    for number, curve in enumerate(drawn.curves):
        colour = f"C{curve.run % 10}"
        # Several metrics of one run, and runs of one colour: told by their strokes.
        earlier = sum(other.run == curve.run for other in drawn.curves[:number])
        stroke = ("-", "--", "-.", ":")[(earlier + curve.run // 10) % 4]
        mark = "." if len(curve.x) <= _MOST_MARKED else ""
        if curve.smooth is not None:
            axes.plot(curve.x, curve.y, stroke, color=colour, alpha=_RAW_ALPHA, gid=f"{curve.label} unsmoothed")
        axes.plot(curve.x, curve.shown, stroke, marker=mark, color=colour, label=curve.label, gid=curve.label)
    if drawn.panel.is_log and all((curve.y > 0).any() for curve in drawn.curves):
        axes.set_yscale("log")
    for number, run in enumerate(runs):
        for place in run.resumes_along(axis):
            axes.axvline(place, color=f"C{number % 10}", linestyle="--", linewidth=0.8, gid=f"{run.name} resumed")
    axes.set_title(drawn.panel.title, fontsize="medium")
    axes.set_xlabel(axis)
    axes.grid(visible=True, alpha=0.3)
    if is_named:
        # The best place of many long curves takes seconds to find, and matplotlib says so.
        _add_legend(axes.legend, [axes], [curve.label for curve in drawn.curves], loc="upper right")


def _names_in_a_row(names: Sequence[str]) -> int:
    """As many of the longest as the figure is wide."""
    width_in = _STROKE_WIDTH_IN + _LETTER_WIDTH_IN * max(map(len, names), default=0)
    return max(1, min(_MOST_IN_A_ROW, int(2 * _WIDTH_IN / width_in)))


def _add_legend(add: Callable[..., Legend], places: Sequence[Axes], names: Sequence[str], **where: str | int) -> None:
    """Name lines of ``places`` in a legend of the figure or of its axes, whichever ``add`` is a method of.

    Names stand as they are: matplotlib leaves out labels that begin with an underscore, and takes dollar signs for
    formulas.
    """
    lines = {line.get_label(): line for axes in places for line in axes.get_lines()}
    numbers = map(str, range(len(names)))
    legend = add([lines[name] for name in names], numbers, fontsize="small", **where)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(name)
        text.set_parse_math(False)


def _draw_map(figure: Figure, axes: Axes, balance: BalanceMap, axis: Axis, fullest: float) -> None:
    from matplotlib.ticker import MaxNLocator

    mesh = axes.pcolormesh(
        balance.x,
        balance.layers,
        balance.values_LC,
        shading="nearest",
        cmap="viridis",
        vmin=0.0,
        vmax=fullest or 1.0,
        gid=f"{balance.run} experts",
    )
    mesh.set_rasterized(True)
    figure.colorbar(mesh, ax=axes)
    axes.invert_yaxis()
    axes.set_title(f"experts of {balance.run}: {BALANCE_TITLE}", fontsize="small", parse_math=False)
    axes.set_xlabel(axis)
    axes.set_ylabel("MoE layer")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
