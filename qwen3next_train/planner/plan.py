"""What a run needs before it is started: parameters, FLOPs, memory, time, and what to change if it does not fit.

Pure arithmetic over the configuration; no torch, no GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from qwen3next_train.accounting.hardware import Device, find_device
from qwen3next_train.accounting.layout import Layout
from qwen3next_train.accounting.memory import (
    ADAM_STATE_BYTES,
    host_bytes_per_gpu,
    memory_per_gpu,
    parameter_kinds,
)
from qwen3next_train.accounting.workload import Workload, workload_of
from qwen3next_train.config.batch_size import samples_through, steps_for
from qwen3next_train.config.schema import Config
from qwen3next_train.config.validate import validate_for_world
from qwen3next_train.errors import ConfigError
from qwen3next_train.planner.layouts import Traffic, fits_device, layouts_that_fit, traffic_per_step
from qwen3next_train.planner.recompute import RecomputeView, extra_work, recompute_views
from qwen3next_train.topology import RANKS_PER_NODE

ASSUMED_MFU = 0.25
"""MFU when none is stated, without whole layers done again; the best published figures for this model family on Hopper
are 0.1 to 0.3."""
_SECONDS_PER_DAY = 86_400


@dataclass(frozen=True)
class Plan:
    """Everything ``plan`` reports.

    Args:
        config: the planned configuration.
        layout: its layout over the GPUs.
        gpu: GPU as the user named it.
        device: its row of the device table; None when unknown, and then ``fits``, times and traffic are None.
        mfu: model FLOPs utilisation that the times assume.
        mfu_is_assumed: nobody stated it.
        workload: size of the model and work of a step.
        num_steps: steps of the run.
        num_tokens: tokens of them.
        memory_by_part: bytes on one GPU.
        host_bytes: bytes of host memory for one GPU's offloaded optimizer.
        checkpoint_bytes: fp32 master weights and both moments of all ranks.
        fits: whether the memory fits the device.
        recompute: what the same layout would take with more recompute, the mildest first.
        changes: layouts near this one that fit, best first; empty when this one fits or none does.
        traffic: communication per step.
    """

    config: Config
    layout: Layout
    gpu: str
    device: Device | None
    mfu: float
    mfu_is_assumed: bool
    workload: Workload
    num_steps: int
    num_tokens: int
    memory_by_part: dict[str, int]
    host_bytes: int
    checkpoint_bytes: int
    fits: bool | None
    recompute: tuple[RecomputeView, ...]
    changes: tuple[Layout, ...]
    traffic: Traffic | None

    @property
    def memory_bytes(self) -> int:
        """Bytes on one GPU."""
        return sum(self.memory_by_part.values())

    @property
    def step_time_s(self) -> float | None:
        """Seconds per optimizer step with the whole batch at :attr:`mfu`; None when the device's peak is unknown."""
        if self.device is None:
            return None
        peak = self.device.peak_flops(self.layout.precision)
        return self.workload.flops_per_step / (self.layout.world_size * peak * self.mfu)

    @property
    def days(self) -> float | None:
        """Days for all steps; None when the device's peak is unknown."""
        if self.step_time_s is None:
            return None
        return self.num_tokens / self.workload.num_tokens * self.step_time_s / _SECONDS_PER_DAY


def make_plan(config: Config, *, gpus: int, gpu: str, mfu: float | None, tokens: float | None) -> Plan:
    """Plan a run.

    Args:
        config: resolved configuration.
        gpus: number of GPUs, one process each.
        gpu: a name of :mod:`qwen3next_train.accounting.hardware` or a ``torch.cuda`` device name.
        mfu: model FLOPs utilisation in (0, 1] for the times; None assumes :data:`ASSUMED_MFU`.
        tokens: tokens to train on; None takes ``run.steps``.

    Raises:
        ConfigError: a number out of range, or a layout that training would reject.
    """
    _check_inputs(config, gpus=gpus, mfu=mfu, tokens=tokens)
    device = find_device(gpu)
    layout = Layout.of(config, gpus, ranks_per_node=RANKS_PER_NODE if device is None else device.domain_size)
    kinds = parameter_kinds(config.model)
    memory = memory_per_gpu(config.model, layout, kinds=kinds)
    workload = workload_of(config)
    length, num_steps = config.data.sequence_length, config.run.steps
    if tokens is not None:
        num_steps = steps_for(config, math.ceil(tokens / length))
    fits = None if device is None else fits_device(memory, device)
    changes: tuple[Layout, ...] = ()
    if device is not None and not fits:
        layers_again = extra_work(frozenset(("layer",)), workload) * workload.flops_per_step
        rate = gpus * device.peak_flops(layout.precision) * (ASSUMED_MFU if mfu is None else mfu)
        changes = layouts_that_fit(config, layout, device, kinds, layers_again_s=layers_again / rate)
    return Plan(
        config=config,
        layout=layout,
        gpu=gpu,
        device=device,
        # Of model FLOPs: what is done again takes time and does not count.
        mfu=ASSUMED_MFU / (1 + extra_work(layout.recompute, workload)) if mfu is None else mfu,
        mfu_is_assumed=mfu is None,
        workload=workload,
        num_steps=num_steps,
        num_tokens=samples_through(config, num_steps) * length,
        memory_by_part=memory,
        host_bytes=host_bytes_per_gpu(config.model, layout, kinds=kinds),
        checkpoint_bytes=ADAM_STATE_BYTES * workload.parameters.total,
        fits=fits,
        recompute=recompute_views(config, layout, device, kinds, workload),
        changes=changes,
        traffic=None if device is None else traffic_per_step(config, layout, device, kinds),
    )


def _check_inputs(config: Config, *, gpus: int, mfu: float | None, tokens: float | None) -> None:
    if gpus < 1:
        raise ConfigError(f"plan: --gpus: {gpus} is not a number of GPUs; give 1 or more")
    if mfu is not None and not 0 < mfu <= 1:
        raise ConfigError(f"plan: --mfu: {mfu} is not a utilisation; give a fraction such as 0.3")
    if tokens is not None and not (tokens > 0 and math.isfinite(tokens)):
        raise ConfigError(f"plan: --tokens: {tokens} is not a number of tokens; give one such as 1e12")
    validate_for_world(config, gpus)
