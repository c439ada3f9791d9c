"""The frozen names of all metrics: what ``metrics.jsonl`` and wandb hold, with unit and meaning.

Dashboards and scripts read these names, so one is added or changed only together with a changelog line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from qwen3next_train.config.metric_names import NAME

WANDB_ID = r"[^/\\#?%:\x00-\x20\x7f]{1,128}"
"""Pattern of the ids that wandb accepts, which become part of paths and addresses."""

LayerStatistic = Literal["max_violation", "dead_experts", "router_entropy"]


@dataclass(frozen=True)
class Metric:
    """One metric.

    Args:
        name: key in the records.
        unit: unit of the value, ``1`` for a plain number.
        meaning: one line.
    """

    name: str
    unit: str
    meaning: str


METRICS: tuple[Metric, ...] = (
    Metric("step", "steps", "optimizer steps taken, this one included"),
    Metric("tokens", "tokens", "training tokens consumed so far, all ranks"),
    Metric("loss/lm", "nats per token", "next-token loss, mean over all real tokens of the global batch, unscaled"),
    Metric("loss/mtp", "nats per token", "multi-token prediction loss, mean over the depths, unscaled"),
    Metric("loss/load_balancing", "1", "router load-balancing loss, mean over layers, unscaled; 1 is balanced"),
    Metric("loss/z", "1", "router z-loss, mean over layers, unscaled"),
    Metric("loss/total", "1", "what is differentiated: the losses above with their weights"),
    Metric("optim/lr", "1", "learning rate of this step"),
    Metric("optim/grad_norm", "1", "global gradient norm before clipping"),
    Metric("optim/skipped_steps", "steps", "steps left out so far because a gradient was not finite"),
    Metric("perf/flops_per_step", "FLOP", "model FLOPs of this step, all ranks, recomputation not counted"),
    Metric("perf/flops_total", "FLOP", "model FLOPs spent so far, earlier attempts included"),
    Metric("perf/tflops_per_gpu", "TFLOP/s", "model FLOPs per second and device"),
    Metric("perf/mfu", "1", "share of the device's peak that model FLOPs reach; absent when the peak is unknown"),
    Metric("perf/tokens_per_s", "tokens/s", "training tokens per second, all ranks"),
    Metric("perf/step_time_s", "s", "wall time of this step"),
    Metric("perf/data_wait_s", "s", "part of the step spent waiting for data"),
    Metric("perf/forward_s", "s", "forward passes of this step on rank 0, with `logging.step_parts`"),
    Metric("perf/backward_s", "s", "backward passes of this step on rank 0, with `logging.step_parts`"),
    Metric("perf/optimizer_s", "s", "rest of the reduction, clipping and update on rank 0, with `logging.step_parts`"),
    Metric(
        "perf/save_s",
        "s",
        "for which saves stopped training since the last logged step, with `logging.step_parts`",
    ),
    Metric("perf/eval_s", "s", "validation after this step, with `logging.step_parts`"),
    Metric("mem/peak_gib", "GiB", "peak device memory allocated on rank 0; absent on CPU"),
    Metric("moe/max_violation", "1", "largest expert load over mean load, minus 1; worst layer"),
    Metric("moe/dead_experts", "experts", "experts that got no token in this step, summed over layers"),
    Metric("moe/router_entropy", "nats", "entropy of the router's distribution, mean over tokens and layers"),
    Metric("eval/loss", "nats per token", "next-token loss on the held-out rows"),
    Metric("eval/bpb", "bits per byte", "the same loss in bits per byte of the held-out text"),
)
"""Metrics of the whole model, in the order of the documentation."""

NAMED_METRICS: tuple[Metric, ...] = (
    Metric("eval/{name}/loss", "nats per token", "next-token loss on the rows of a validation set"),
    Metric("eval/{name}/bpb", "bits per byte", "the same loss in bits per byte of the set's text"),
    Metric("loss/{name}", "nats per token", "next-token loss on this step's tokens of a source; absent without any"),
    Metric("data/share_{name}", "1", "share of this step's tokens that are of a source"),
    Metric(
        "loss/position_{first}",
        "nats per token",
        "next-token loss at the positions of documents from N on, up to the next such range",
    ),
)
"""Metrics of a validation set (``data.validation_sets``), of a source or of positions (``logging.loss_by``)."""

LAYER_METRICS: tuple[Metric, ...] = (
    Metric("moe/layer_{layer:02d}/max_violation", "1", "largest expert load over mean load, minus 1"),
    Metric("moe/layer_{layer:02d}/dead_experts", "experts", "experts that got no token in this step"),
    Metric("moe/layer_{layer:02d}/router_entropy", "nats", "entropy of the router's distribution, mean over tokens"),
)
"""Metrics of each MoE layer (numbered from 0, MTP layers last), every ``logging.layer_interval`` steps."""

_GIVEN_NAME = re.compile(rf"eval/{NAME}/(?:loss|bpb)|loss/{NAME}|data/share_{NAME}")
_NAMES = frozenset(metric.name for metric in METRICS)
_LAYER_NAME = re.compile(r"moe/layer_(\d{2}|[1-9]\d{2,})/(max_violation|dead_experts|router_entropy)")


def layer_metric(layer: int, statistic: LayerStatistic) -> str:
    """Name of a per-layer metric, such as ``moe/layer_07/max_violation``."""
    return f"moe/layer_{layer:02d}/{statistic}"


def is_metric_name(name: str) -> bool:
    """Whether ``name`` is one of the frozen names, with any layer, validation set, source or position in it."""
    return name in _NAMES or any(pattern.fullmatch(name) for pattern in (_LAYER_NAME, _GIVEN_NAME))
