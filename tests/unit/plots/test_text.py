"""Curves as lines of text."""

from __future__ import annotations

import numpy as np

from qwen3next_train.plots.panels import BalanceMap, Curve, DrawnPanel, Panel
from qwen3next_train.plots.text import text_map, text_panel


def curve(label: str, run: int, x: list[float], y: list[float]) -> Curve:
    return Curve(label, run, np.array(x, dtype=float), np.array(y, dtype=float), None)


def test_curves_stand_where_their_values_are() -> None:
    one = curve("one", 0, [1, 12], [12.0, 1.0])
    two = curve("two", 1, [1, 12], [1.0, 1.0])
    drawn = DrawnPanel(Panel("loss", "loss/lm"), (one, two))
    # 46 columns leave 34 for the canvas, three to each of its twelve lines but the first and the last.
    lines = text_panel(drawn, axis="steps", width=46, resumes=[1.0, 12.0, 40.0])
    assert lines[0] == "loss"
    assert lines[1] == "        12 |**"
    assert lines[2] == "           |  ***"
    assert lines[6] == "           |              ***"
    assert lines[12] == f"         1 |{34 * 'o'}"
    assert lines[13] == f"           +^{32 * '-'}^"
    assert lines[14] == "            1                         12 steps"
    assert lines[15:] == [
        "         ^  resumed",
        "         *  one, last 1",
        "         o  two, last 1",
    ]


def test_a_logarithmic_panel_has_decades_of_equal_height() -> None:
    drawn = DrawnPanel(Panel("norm", "x", is_log=True), (curve("one", 0, [0, 1, 2], [1e11, 1e6, 1.0]),))
    lines = text_panel(drawn, axis="steps", width=0, resumes=[])
    assert lines[0] == "norm (log)"
    # 20 columns: the powers 11, 6 and 0 stand in the lines 0, 5 and 11 of the columns 0, 10 and 19.
    assert lines[1].startswith("     1e+11 |*")
    assert lines[1 + 5][12 + 10] == "*"
    assert lines[1 + 11] == f"         1 |{19 * ' '}*"


def test_values_that_are_not_finite_and_flat_curves_are_drawn() -> None:
    drawn = DrawnPanel(Panel("norm", "x", is_log=True), (curve("one", 0, [1, 2, 3], [0.0, np.nan, 0.0]),))
    lines = text_panel(drawn, axis="tokens", width=0, resumes=[])
    assert lines[0] == "norm"
    assert lines[1].split()[0] == "0.5"
    assert sum(line.count("*") for line in lines[1:13]) == 20
    assert lines[-1] == "         *  one, last 0"


def test_a_map_is_darker_where_experts_are_fuller() -> None:
    balance = BalanceMap("one", (0, 7), np.array([10.0, 20.0]), np.array([[0.0, 0.0], [9.0, np.nan]]))
    lines = text_map(balance, axis="steps", width=32)
    assert lines[1] == "   layer 0 |"
    assert lines[2] == "   layer 7 |@" + 19 * "?"
    assert lines[-1] == "            ' ' 0 to '@' 9"


def test_limits_are_those_of_what_is_drawn() -> None:
    # 20 columns for 40 points: each is the mean of two, of which one is far off.
    values = [0.0, 10.0] * 19 + [8.0, 8.0]
    drawn = DrawnPanel(Panel("loss", "loss/lm"), (curve("one", 0, list(np.arange(40) // 2), values),))
    lines = text_panel(drawn, axis="steps", width=0, resumes=[])
    assert lines[1] == f"         8 |{19 * ' '}*"
    assert lines[12] == f"         5 |{19 * '*'}"
