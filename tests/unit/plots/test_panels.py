"""Curves and maps of what was logged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qwen3next_train.plots.panels import balance_maps, draw_panels, smoothed
from qwen3next_train.plots.runs import read_runs
from tests.unit.plots.runs import row, write_run


def test_smoothing_is_a_moving_average_with_its_start_corrected() -> None:
    values = np.array([1.0, np.nan, 2.0, 4.0])
    # Weights of the values in the end: 1/7, 2/7, 4/7.
    np.testing.assert_allclose(smoothed(values, 0.5), [1.0, np.nan, 5 / 3, 3.0])


def test_panels_hold_what_was_logged(tmp_path: Path) -> None:
    rows = [
        row(1, loss_lm=8.0, optim_lr=1e-3, perf_tokens_per_s=10.0, perf_tflops_per_gpu=2.0),
        row(2, loss_lm=6.0, optim_lr=2e-3, perf_tokens_per_s=20.0, perf_tflops_per_gpu=4.0, eval_loss=7.0),
    ]
    rows[1]["eval/books/loss"] = 5.0
    runs = read_runs([write_run(tmp_path / "one", rows), write_run(tmp_path / "two", [row(3, loss_lm=4.0)])])
    panels = {each.panel.title: each.curves for each in draw_panels(runs, axis="tokens", rate="flops", smoothing=0.5)}
    assert list(panels) == [
        "next-token loss, nats per token",
        "validation loss, nats per token",
        "learning rate",
        "rate, TFLOP/s per device",
    ]
    one, two = panels["next-token loss, nats per token"]
    assert (one.label, one.run, one.x.tolist(), one.y.tolist()) == ("one", 0, [100, 200], [8.0, 6.0])
    assert one.shown.tolist() == pytest.approx([8.0, 20 / 3])
    assert (two.label, two.run, two.x.tolist(), two.y.tolist()) == ("two", 1, [300], [4.0])
    whole, books = panels["validation loss, nats per token"]
    assert (whole.label, whole.x.tolist(), whole.y.tolist()) == ("one", [200], [7.0])
    assert (books.label, books.x.tolist(), books.y.tolist()) == ("one eval/books/loss", [200], [5.0])
    # A schedule is not noise.
    assert panels["learning rate"][0].shown.tolist() == [1e-3, 2e-3]


def test_named_sets_sources_and_positions_have_panels(tmp_path: Path) -> None:
    rows = [row(1, loss_lm=8.0, loss_z=1.0, loss_total=9.0), row(2, loss_lm=6.0), row(3, loss_lm=5.0)]
    rows[0] |= {"loss/web": 7.0, "data/share_web": 1.0, "loss/position_0": 9.0, "eval/code/bpb": 2.0}
    rows[1] |= {"data/share_web": 0.0, "loss/position_0": 8.0}
    rows[2] |= {"loss/web": 6.0, "data/share_web": 0.5, "loss/position_16": 7.0}
    runs = read_runs([write_run(tmp_path / "one", rows)])
    panels = {each.panel.title: each.curves for each in draw_panels(runs, axis="steps", rate="tokens", smoothing=0.0)}
    found = {title: {curve.label: (curve.x.tolist(), curve.y.tolist()) for curve in panels[title]} for title in panels}
    assert found == {
        "next-token loss, nats per token": {"one": ([1, 2, 3], [8.0, 6.0, 5.0])},
        "validation loss, bits per byte": {"one eval/code/bpb": ([1], [2.0])},
        "loss by source, nats per token": {"one loss/web": ([1, 3], [7.0, 6.0])},
        "share of tokens by source": {"one data/share_web": ([1, 2, 3], [1.0, 0.0, 0.5])},
        "loss by position in the document, nats per token": {
            "one loss/position_0": ([1, 2], [9.0, 8.0]),
            "one loss/position_16": ([3], [7.0]),
        },
    }


def test_what_has_a_runs_name_alone_is_first_of_its_panel(tmp_path: Path) -> None:
    """Strokes go by the order: the run's is then the same in all panels, which share their names below."""
    logged = row(1) | {"eval/books/loss": 5.0, "eval/loss": 7.0, "eval/wiki/loss": 6.0}
    runs = read_runs([write_run(tmp_path / "one", [logged])])
    (panel,) = draw_panels(runs, axis="steps", rate="tokens", smoothing=0.0)
    assert [curve.label for curve in panel.curves] == ["one", "one eval/books/loss", "one eval/wiki/loss"]


def test_a_metric_that_was_never_finite_is_no_panel(tmp_path: Path) -> None:
    runs = read_runs([write_run(tmp_path / "one", [row(1, loss_lm=None)])])
    assert list(draw_panels(runs, axis="steps", rate="tokens", smoothing=0.0)) == []


def test_a_map_has_the_steps_at_which_layers_were_logged(tmp_path: Path) -> None:
    rows = [row(1, loss_lm=8.0), row(2, loss_lm=8.0), row(3, loss_lm=8.0)]
    for layer in (0, 1, 10):
        rows[0][f"moe/layer_{layer:02d}/max_violation"] = 1.0 + layer
        rows[2][f"moe/layer_{layer:02d}/max_violation"] = 2.0 + layer
    runs = read_runs([write_run(tmp_path / "one", rows), write_run(tmp_path / "two", [row(1, loss_lm=8.0)])])
    (balance,) = balance_maps(runs, "steps")
    assert (balance.run, balance.layers, balance.x.tolist()) == ("one", (0, 1, 10), [1, 3])
    assert balance.values_LC.tolist() == [[1.0, 2.0], [2.0, 3.0], [11.0, 12.0]]
