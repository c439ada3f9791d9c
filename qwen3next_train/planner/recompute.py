"""What recomputing activations saves and costs, part by part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from qwen3next_train.accounting.flops import PARTS_OUTSIDE_LAYERS, TRAINING_PASSES
from qwen3next_train.accounting.hardware import Device
from qwen3next_train.accounting.layout import Layout
from qwen3next_train.accounting.memory import ParameterKind, memory_per_gpu
from qwen3next_train.accounting.workload import Workload
from qwen3next_train.config.schema import Config, RecomputePart
from qwen3next_train.planner.layouts import CHEAP_PARTS, fits_device


@dataclass(frozen=True)
class RecomputeView:
    """A layout with more recompute than it has.

    Args:
        recompute: the value of ``parallel.recompute``.
        memory_by_part: bytes on one GPU.
        extra_work: FLOPs that are done again, as a share of the model's.
        fits: whether the memory fits the device; None without a known device.
    """

    recompute: tuple[RecomputePart, ...]
    memory_by_part: dict[str, int]
    extra_work: float
    fits: bool | None


def recompute_views(
    config: Config, layout: Layout, device: Device | None, kinds: Counter[ParameterKind], workload: Workload
) -> tuple[RecomputeView, ...]:
    """The layout with each part that it does not recompute yet, with all cheap ones, and with whole layers."""
    views = []
    for parts in _more_than(layout.recompute):
        memory = memory_per_gpu(config.model, replace(layout, recompute=frozenset(parts)), kinds=kinds)
        fits = None if device is None else fits_device(sum(memory.values()), device)
        views.append(RecomputeView(parts, memory, extra_work(frozenset(parts), workload), fits))
    return tuple(views)


def extra_work(recompute: frozenset[RecomputePart], workload: Workload) -> float:
    """FLOPs that are done again, as a share of the model's; cheap parts count with the convolution's."""
    if not recompute:
        return 0.0
    flops = workload.flops_by_part
    if "layer" in recompute:
        again = sum(count for part, count in flops.items() if part not in PARTS_OUTSIDE_LAYERS)
    else:
        again = flops["gdn_conv"] if "gdn_prologue" in recompute else 0
    return again / TRAINING_PASSES / workload.flops_per_step


def _more_than(recompute: frozenset[RecomputePart]) -> Iterator[tuple[RecomputePart, ...]]:
    """Values of ``parallel.recompute`` that recompute more, the mildest first."""
    if "layer" in recompute:
        return
    missing = [part for part in CHEAP_PARTS if part not in recompute]
    for part in missing:
        yield tuple(each for each in CHEAP_PARTS if each in recompute or each == part)
    if len(missing) > 1:
        yield CHEAP_PARTS
    yield ("layer",)
