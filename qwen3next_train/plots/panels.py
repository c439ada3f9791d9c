"""What is drawn: which metrics share a panel, and their curves and maps, the same for pictures and text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from qwen3next_train.config.metric_names import NAME
from qwen3next_train.plots.runs import Axis, Floats, LoggedRun

Rate = Literal["tokens", "flops"]

_OTHER_LOSSES = r"(?:lm|mtp|load_balancing|z|total|position_\d+)$"
_LAYER = re.compile(r"moe/layer_(\d+)/max_violation")


@dataclass(frozen=True)
class Panel:
    """Metrics that are drawn over each other.

    Args:
        title: above it.
        pattern: of the metrics' names.
        is_log: the vertical axis is logarithmic.
        is_noisy: smoothing applies; not to what is a setting or a mean over held-out text.
        is_sparse: rows may lack it, which makes no gaps of them.
    """

    title: str
    pattern: str
    is_log: bool = False
    is_noisy: bool = True
    is_sparse: bool = False


@dataclass(frozen=True)
class Curve:
    """One line.

    Letters: P points.

    Args:
        label: run and metric.
        run: number of the run, which is its colour.
        x: ``[P]``, ascending.
        y: ``[P]``, finite or NaN.
        smooth: ``[P]``, ``y`` smoothed; None where nothing is.
    """

    label: str
    run: int
    x: Floats
    y: Floats
    smooth: Floats | None

    @property
    def shown(self) -> Floats:
        """What the eye should follow."""
        return self.y if self.smooth is None else self.smooth


@dataclass(frozen=True)
class DrawnPanel:
    """A panel and what is in it."""

    panel: Panel
    curves: tuple[Curve, ...]


@dataclass(frozen=True)
class BalanceMap:
    """Largest load over mean load, minus 1, of the experts of each layer over the run.

    Letters: L MoE layers, C logged steps.

    Args:
        run: its name.
        layers: ``[L]``, their numbers.
        x: ``[C]``, ascending.
        values_LC: ``[L, C]``.
    """

    run: str
    layers: tuple[int, ...]
    x: Floats
    values_LC: Floats


BALANCE_TITLE = "fullest expert's load over the mean, minus 1"
_RATES = {
    "tokens": Panel("rate, tokens/s", r"perf/tokens_per_s"),
    "flops": Panel("rate, TFLOP/s per device", r"perf/tflops_per_gpu"),
}


def panels_of(rate: Rate) -> tuple[Panel, ...]:
    """All panels in order; ``rate`` says what the speed is counted in."""
    return (
        Panel("next-token loss, nats per token", r"loss/lm"),
        Panel("validation loss, nats per token", r"eval/(?:[^/]+/)?loss", is_noisy=False, is_sparse=True),
        Panel("validation loss, bits per byte", r"eval/(?:[^/]+/)?bpb", is_noisy=False, is_sparse=True),
        Panel("loss by source, nats per token", rf"loss/(?!{_OTHER_LOSSES}){NAME}", is_sparse=True),
        Panel("share of tokens by source", rf"data/share_{NAME}"),
        Panel("loss by position in the document, nats per token", r"loss/position_\d+", is_sparse=True),
        Panel("MTP loss, nats per token", r"loss/mtp"),
        Panel("load-balancing loss", r"loss/load_balancing"),
        Panel("gradient norm before clipping", r"optim/grad_norm", is_log=True),
        Panel("learning rate", r"optim/lr", is_noisy=False),
        _RATES[rate],
        Panel(f"{BALANCE_TITLE}, worst layer", r"moe/max_violation"),
    )


def draw_panels(runs: Sequence[LoggedRun], *, axis: Axis, rate: Rate, smoothing: float) -> Iterator[DrawnPanel]:
    """Every panel of which at least one run has a finite value."""
    for panel in panels_of(rate):
        curves = tuple(
            curve
            for number, run in enumerate(runs)
            # First what has the run's name alone: its stroke is then that of the run in the other panels.
            for metric in sorted(run.values, key=lambda metric: not _is_whole(metric, panel))
            if re.fullmatch(panel.pattern, metric)
            and (curve := _curve(run, number, metric, panel, axis, smoothing)) is not None
        )
        if curves:
            yield DrawnPanel(panel, curves)


def balance_maps(runs: Sequence[LoggedRun], axis: Axis) -> Iterator[BalanceMap]:
    """One map for each run that has logged its layers."""
    for run in runs:
        by_layer = {int(match[1]): metric for metric in run.values if (match := _LAYER.fullmatch(metric))}
        if not by_layer:
            continue
        layers = tuple(sorted(by_layer))
        values_LR = np.stack([run.values[by_layer[layer]] for layer in layers])
        logged_R = np.isfinite(values_LR).any(axis=0)
        if logged_R.any():
            yield BalanceMap(run.name, layers, run.along(axis)[logged_R], values_LR[:, logged_R])


def smoothed(values: Floats, weight: float) -> Floats:
    """Exponential moving average with Adam's correction of the start, so that the first value is itself.

    Args:
        values: ``[P]``; NaN is passed over and stays NaN.
        weight: of what came before, 0 to less than 1; what TensorBoard calls smoothing.
    """
    result = np.full_like(values, np.nan)
    mean = total = 0.0
    for index in np.flatnonzero(np.isfinite(values)):
        mean = weight * mean + (1 - weight) * values[index]
        total = weight * total + (1 - weight)
        result[index] = mean / total
    return result


def _curve(run: LoggedRun, number: int, metric: str, panel: Panel, axis: Axis, smoothing: float) -> Curve | None:
    # That most rows have no validation makes no gaps of them; a training loss that was not finite is one.
    x, y = run.along(axis), run.values[metric]
    if panel.is_sparse:
        x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    if not np.isfinite(y).any():
        return None
    label = run.name if _is_whole(metric, panel) else f"{run.name} {metric}"
    return Curve(label, number, x, y, smoothed(y, smoothing) if smoothing and panel.is_noisy else None)


def _is_whole(metric: str, panel: Panel) -> bool:
    """Whether it is the panel's only metric, or of all of which others are parts."""
    return metric in (panel.pattern, "eval/loss", "eval/bpb")
