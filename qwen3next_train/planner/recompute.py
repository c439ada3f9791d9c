"""What recomputing activations would save and cost; training has no setting for it yet."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from qwen3next_train.accounting.activations import RECOMPUTE_MODES, Recompute
from qwen3next_train.accounting.flops import PARTS_OUTSIDE_LAYERS, TRAINING_PASSES
from qwen3next_train.accounting.hardware import Device
from qwen3next_train.accounting.layout import Layout
from qwen3next_train.accounting.memory import ParameterKind, memory_per_gpu
from qwen3next_train.accounting.workload import Workload
from qwen3next_train.config.schema import Config
from qwen3next_train.planner.layouts import fits_device, layouts_that_fit


@dataclass(frozen=True)
class RecomputeView:
    """One layout with recomputation.

    Args:
        mode: ``selective`` or ``full``.
        memory_by_part: bytes on one GPU.
        extra_work: FLOPs that are done again, as a share of the model's; of ``selective`` the convolution's.
        fits: whether the memory fits the device; None without a known device.
        changes: of ``full``, layouts near this one that would fit with it, best first; empty when this one would or
            none does.
    """

    mode: Recompute
    memory_by_part: dict[str, int]
    extra_work: float
    fits: bool | None
    changes: tuple[Layout, ...]


def recompute_views(
    config: Config, layout: Layout, device: Device | None, kinds: Counter[ParameterKind], workload: Workload
) -> tuple[RecomputeView, ...]:
    """The layout under every recomputation there could be, the one that computes least again first."""
    return tuple(_view(mode, config, layout, device, kinds, workload) for mode in RECOMPUTE_MODES if mode != "none")


def _view(
    mode: Recompute,
    config: Config,
    layout: Layout,
    device: Device | None,
    kinds: Counter[ParameterKind],
    workload: Workload,
) -> RecomputeView:
    memory = memory_per_gpu(config.model, layout, kinds=kinds, recompute=mode)
    fits = None if device is None else fits_device(memory, device)
    changes: tuple[Layout, ...] = ()
    if mode == "full" and device is not None and not fits:
        changes = layouts_that_fit(config, layout, device, kinds, recompute=mode)
    again = sum(flops for part, flops in workload.flops_by_part.items() if _is_done_again(part, mode))
    return RecomputeView(
        mode=mode,
        memory_by_part=memory,
        extra_work=again / TRAINING_PASSES / workload.flops_per_step,
        fits=fits,
        changes=changes,
    )


def _is_done_again(part: str, mode: Recompute) -> bool:
    return part == "gdn_conv" if mode == "selective" else part not in PARTS_OUTSIDE_LAYERS
