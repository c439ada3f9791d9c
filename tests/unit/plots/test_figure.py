"""Curves as pictures: the points that were logged, in the file."""

from __future__ import annotations

import re
import struct
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence

import numpy as np
import pytest
from matplotlib.figure import Figure

from qwen3next_train.plots.figure import draw_figure, render
from qwen3next_train.plots.panels import BalanceMap, Curve, DrawnPanel, Panel, balance_maps, draw_panels
from qwen3next_train.plots.runs import LoggedRun, read_runs
from tests.unit.plots.runs import row, write_run

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[LoggedRun]:
    tmp_path = tmp_path_factory.mktemp("runs")
    rows = [row(step, loss_lm=loss, optim_grad_norm=1.0) for step, loss in enumerate([8.0, 4.0, 6.0, 2.0], start=1)]
    for layer in (0, 1):
        rows[1][f"moe/layer_{layer:02d}/max_violation"] = 1.0 + layer
    rows_of_other = [row(1, loss_lm=5.0), row(4, loss_lm=3.0)]
    return read_runs(
        [write_run(tmp_path / "one", rows, first_steps=(0, 2)), write_run(tmp_path / "two", rows_of_other)]
    )


@pytest.fixture(scope="module")
def plain(runs: list[LoggedRun]) -> bytes:
    """Without smoothing; drawing takes a second."""
    return drawn(runs)


def drawn(runs: list[LoggedRun], smoothing: float = 0.0) -> bytes:
    panels = list(draw_panels(runs, axis="steps", rate="tokens", smoothing=smoothing))
    return render(draw_figure(panels, list(balance_maps(runs, "steps")), runs, "steps"), "svg")


def points(svg: bytes, name: str) -> np.ndarray:
    """Corners of the first line of a name, in the picture's units, y downwards."""
    group = next(each for each in ElementTree.fromstring(svg).iter(f"{SVG}g") if each.get("id") == name)
    path = next(group.iter(f"{SVG}path")).get("d") or ""
    return np.array([[float(number) for number in pair] for pair in re.findall(r"[ML] (\S+) (\S+)", path)])


def test_the_points_of_an_svg_file_are_those_of_the_run(plain: bytes) -> None:
    found = points(plain, "one")
    x, y = found.T
    # Steps 1 to 4 and losses 8, 4, 6, 2 under one scale each.
    np.testing.assert_allclose((x - x[0]) / (x[-1] - x[0]), [0, 1 / 3, 2 / 3, 1], atol=1e-6)
    np.testing.assert_allclose((y - y[0]) / (y[-1] - y[0]), [0, 2 / 3, 1 / 3, 1], atol=1e-6)
    assert y[-1] > y[0]
    # The other run under the same scale: losses 5 and 3, from the first step to the last.
    other_x, other_y = points(plain, "two").T
    np.testing.assert_allclose(other_x, x[[0, -1]])
    np.testing.assert_allclose((other_y - y[0]) / (y[-1] - y[0]), [1 / 2, 5 / 6], atol=1e-6)


def test_smoothing_keeps_the_points_beneath(runs: list[LoggedRun], plain: bytes) -> None:
    svg = drawn(runs, smoothing=0.5)
    raw, smooth = points(svg, "one unsmoothed"), points(svg, "one")
    np.testing.assert_allclose(raw[:, 0], points(plain, "one")[:, 0])
    # 8, 16/3, 40/7, 56/15 are less far from each other than 8 and 2.
    y, scale = smooth[:, 1], (raw[-1, 1] - raw[0, 1]) / 6
    np.testing.assert_allclose(8 - (y - raw[0, 1]) / scale, [8, 16 / 3, 40 / 7, 56 / 15], atol=1e-5)


def test_a_resume_is_a_line_at_its_step(plain: bytes) -> None:
    x = points(plain, "one resumed")[:, 0]
    np.testing.assert_allclose(x, points(plain, "one")[1, 0])
    assert b'id="two resumed"' not in plain


def test_text_is_text_and_the_same_numbers_give_the_same_file(runs: list[LoggedRun], plain: bytes) -> None:
    text = {each.text for each in ElementTree.fromstring(plain).iter(f"{SVG}text")}
    assert {"next-token loss, nats per token", "gradient norm before clipping", "one", "two", "MoE layer"} <= text
    assert plain == drawn(runs)


def test_a_png_file_has_the_size_of_its_panels(runs: list[LoggedRun]) -> None:
    panels = list(draw_panels(runs, axis="steps", rate="tokens", smoothing=0.0))
    maps = list(balance_maps(runs, "steps"))
    png = render(draw_figure(panels, maps, runs, "steps"), "png")
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    # Two panels and a map in two columns, 6 by 3.4 inches at 120 dots each.
    assert struct.unpack(">II", png[16:24]) == (2 * 720, 2 * 408)


def test_names_of_many_curves_stand_once_below_the_panels() -> None:
    """Twenty-three in two panels: in both they would leave no room for the curves."""
    x = np.arange(5.0)
    curves = tuple(Curve(f"run {number}", number, x, x + number, None) for number in range(23))
    panels = [DrawnPanel(Panel(title, "loss/lm"), curves) for title in ("first", "second")]
    figure = draw_figure(panels, [], [], "steps")
    svg = render(figure, "svg")
    texts = [each.text for each in ElementTree.fromstring(svg).iter(f"{SVG}text")]
    assert [texts.count(curve.label) for curve in curves] == [1] * 23
    assert [axes.get_legend() for axes in figure.axes] == [None, None]
    # A row of panels, and four rows of six names.
    assert tuple(figure.get_size_inches()) == pytest.approx((12, 3.4 + 4 * 0.2))
    assert all(axes.get_position().height > 0.6 for axes in figure.axes)
    strokes = {line.get_label(): (line.get_color(), line.get_linestyle()) for line in figure.axes[0].get_lines()}
    assert len(set(strokes.values())) == 23


def inches_across(figure: Figure) -> tuple[float, float]:
    """Where the names below the panels begin and end, once drawn."""
    render(figure, "png")
    (legend,) = figure.legends
    box = legend.get_window_extent().transformed(figure.dpi_scale_trans.inverted())
    return box.x0, box.x1


def panel_of(names: Sequence[str]) -> list[DrawnPanel]:
    x = np.arange(5.0)
    curves = tuple(Curve(name, number, x, x + number, None) for number, name in enumerate(names))
    return [DrawnPanel(Panel("loss", "loss/lm"), curves)]


@pytest.mark.parametrize(("letters", "rows"), [(6, 2), (30, 3), (52, 6), (140, 12)])
def test_long_names_stand_in_as_many_rows_as_the_picture_is_wide(letters: int, rows: int) -> None:
    names = [f"{number:02d}".rjust(letters, "n") for number in range(12)]
    figure = draw_figure(panel_of(names), [], [], "steps")
    begin, end = inches_across(figure)
    assert 0 < begin < end < 12
    assert figure.get_size_inches()[1] == pytest.approx(3.4 + rows * 0.2)


NAMES = ["_hidden", "$x^$", "$lr$", "a<b>&c", "\\frac", "100%", "#1", "^", "{}"]


@pytest.mark.parametrize("names", [NAMES[:5], NAMES])
def test_names_of_folders_are_written_as_they_are(names: list[str]) -> None:
    """In a panel and below all: what begins with an underscore too, and formulas that are none."""
    svg = render(draw_figure(panel_of(names), [], [], "steps"), "svg")
    texts = [each.text for each in ElementTree.fromstring(svg).iter(f"{SVG}text")]
    assert [texts.count(name) for name in names] == [1] * len(names)


def test_a_maps_title_is_no_formula() -> None:
    balance = BalanceMap("$x^$", (0, 1), np.arange(3.0), np.ones((2, 3)))
    assert b"experts of $x^$: " in render(draw_figure(panel_of(["a"]), [balance], [], "steps"), "svg")
