"""What a run needs before it is started: parameters, FLOPs, memory, time, and what to change if it does not fit.

Pure arithmetic over the configuration; no torch, no GPU.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from qwen3next_train.accounting.hardware import Device, find_device
from qwen3next_train.accounting.layout import Layout
from qwen3next_train.accounting.memory import (
    ADAM_STATE_BYTES,
    ParameterKind,
    host_bytes_per_gpu,
    memory_per_gpu,
    parameter_kinds,
    snapshot_bytes_per_gpu,
)
from qwen3next_train.accounting.workload import Workload, workload_of
from qwen3next_train.config.batch_size import samples_through, steps_for
from qwen3next_train.config.schema import Config
from qwen3next_train.config.validate import validate_for_world
from qwen3next_train.errors import ConfigError
from qwen3next_train.planner.layouts import ZERO_STAGES, TimedLayout, fastest_layouts, fits_device, layouts_that_fit
from qwen3next_train.planner.recompute import RecomputeView, recompute_views
from qwen3next_train.planner.step_time import StepClock, StepTime
from qwen3next_train.topology import RANKS_PER_NODE

TIME_ERROR = 0.1
"""By how much predicted times were wrong at most where they were measured and the device did not wait for its host."""
_SECONDS_PER_DAY = 86_400


@dataclass(frozen=True)
class Plan:
    """Everything ``plan`` reports.

    Args:
        config: the planned configuration.
        layout: its layout over the GPUs.
        gpu: GPU as the user named it.
        device: its row of the device table; None when unknown, and then ``fits`` and times are None.
        stated_mfu: model FLOPs utilisation that the times assume in place of :attr:`step`; None where none is stated.
        workload: size of the model and work of a step.
        num_steps: steps of the run.
        num_tokens: tokens of them.
        memory_by_part: bytes on one GPU.
        host_bytes: bytes of host memory for one GPU's offloaded optimizer.
        snapshot_bytes: bytes of host memory from which each GPU's process saves beside training; 0 where it does not.
        checkpoint_bytes: fp32 master weights and both moments of all ranks.
        fits: whether the memory fits the device.
        recompute: what the same layout would take with more recompute, the mildest first.
        changes: layouts near this one that fit, best first; empty when this one fits or none does.
        step: time of a step by the table of rates.
        step_is_estimate: the device's rates were not measured but scaled.
        fastest: the fastest layouts on the same GPUs that fit, the fastest first.
        other_stages: :attr:`recommended` under every other ZeRO stage, whether it fits or not.
        exact_exchange_s: seconds of a step of it with the exact exchange; None unless it exchanges densely.
    """

    config: Config
    layout: Layout
    gpu: str
    device: Device | None
    stated_mfu: float | None
    workload: Workload
    num_steps: int
    num_tokens: int
    memory_by_part: dict[str, int]
    host_bytes: int
    snapshot_bytes: int
    checkpoint_bytes: int
    fits: bool | None
    recompute: tuple[RecomputeView, ...]
    changes: tuple[Layout, ...]
    step: StepTime | None
    step_is_estimate: bool
    fastest: tuple[TimedLayout, ...]
    other_stages: dict[int, TimedLayout]
    exact_exchange_s: float | None

    @property
    def memory_bytes(self) -> int:
        """Bytes on one GPU."""
        return sum(self.memory_by_part.values())

    @property
    def recommended(self) -> TimedLayout | None:
        """The layout to take; None when none fits."""
        return recommended_of(self.fastest) if self.fastest else None

    @property
    def step_time_s(self) -> float | None:
        """Seconds per optimizer step with the whole batch, at the stated MFU if there is one; None without a device."""
        if self.device is None or self.step is None:
            return None
        return self.step.total_s if self.stated_mfu is None else self._at_peak_s(self.device) / self.stated_mfu

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation of such a step; None when the device is unknown."""
        if self.device is None or self.step_time_s is None:
            return None
        return self._at_peak_s(self.device) / self.step_time_s

    def _at_peak_s(self, device: Device) -> float:
        peak = self.layout.world_size * device.peak_flops(self.layout.precision)
        return self.workload.flops_per_step / peak

    @property
    def days(self) -> float | None:
        """Days for all steps; None when the device is unknown."""
        if self.step_time_s is None:
            return None
        return self.num_tokens / self.workload.num_tokens * self.step_time_s / _SECONDS_PER_DAY


def make_plan(
    config: Config,
    *,
    gpus: int,
    gpu: str,
    mfu: float | None,
    tokens: float | None,
    progress: Callable[[int, int], None] = lambda num_done, num_all: None,
) -> Plan:
    """Plan a run.

    Args:
        config: resolved configuration.
        gpus: number of GPUs, one process each.
        gpu: a name of :mod:`qwen3next_train.accounting.hardware` or a ``torch.cuda`` device name.
        mfu: model FLOPs utilisation in (0, 1] for the times; None takes :mod:`qwen3next_train.planner.rates`.
        tokens: tokens to train on; None takes ``run.steps``.
        progress: is told how many of how many layouts have been looked at.

    Raises:
        ConfigError: a number out of range, or a layout that training would reject.
    """
    _check_inputs(config, gpus=gpus, mfu=mfu, tokens=tokens)
    device = find_device(gpu)
    layout = Layout.of(config, gpus, ranks_per_node=RANKS_PER_NODE if device is None else device.domain_size)
    kinds = parameter_kinds(config.model)
    memory = memory_per_gpu(config.model, layout, kinds=kinds)
    workload = workload_of(config)
    clock = None if device is None else StepClock(config, device, kinds)
    length, num_steps = config.data.sequence_length, config.run.steps
    if tokens is not None:
        num_steps = steps_for(config, math.ceil(tokens / length))
    fits = None if device is None else fits_device(sum(memory.values()), device)
    changes: tuple[Layout, ...] = ()
    fastest: tuple[TimedLayout, ...] = ()
    if device is not None and clock is not None:
        fastest = fastest_layouts(config, layout, device, kinds, clock, progress)
        changes = () if fits else layouts_that_fit(config, layout, device, kinds, clock)
    other_stages: dict[int, TimedLayout] = {}
    exact_exchange_s = None
    if clock is not None and fastest:
        best = recommended_of(fastest).layout
        other_stages = _other_stages(config, best, clock, kinds)
        if best.exchanges_densely:
            exact_exchange_s = clock.step(replace(best, token_exchange="exact")).total_s
    return Plan(
        config=config,
        layout=layout,
        gpu=gpu,
        device=device,
        stated_mfu=mfu,
        workload=workload,
        num_steps=num_steps,
        num_tokens=samples_through(config, num_steps) * length,
        memory_by_part=memory,
        host_bytes=host_bytes_per_gpu(config.model, layout, kinds=kinds),
        snapshot_bytes=snapshot_bytes_per_gpu(config.model, layout, kinds=kinds) if config.checkpoint.async_save else 0,
        checkpoint_bytes=ADAM_STATE_BYTES * workload.parameters.total,
        fits=fits,
        recompute=recompute_views(config, layout, device, kinds, workload),
        changes=changes,
        step=None if clock is None else clock.step(layout),
        step_is_estimate=clock is not None and clock.rates.is_estimate,
        fastest=fastest,
        other_stages=other_stages,
        exact_exchange_s=exact_exchange_s,
    )


def recommended_of(fastest: Sequence[TimedLayout]) -> TimedLayout:
    """The fastest under ZeRO-1 unless another stage is faster by more than the times may be wrong, else the fastest."""
    of_stage_1 = (each for each in fastest if each.layout.zero_stage == 1)
    best = next(of_stage_1, fastest[0])
    return best if best.step.total_s <= (1 + TIME_ERROR) * fastest[0].step.total_s else fastest[0]


def _other_stages(
    config: Config, layout: Layout, clock: StepClock, kinds: Counter[ParameterKind]
) -> dict[int, TimedLayout]:
    """The layout by ZeRO stage; stage 3 has one micro-batch in flight, and no offload."""
    stages: dict[int, TimedLayout] = {}
    for stage in ZERO_STAGES:
        in_flight = 1 if stage == 3 else layout.micro_batches_in_flight
        if stage != layout.zero_stage and not (stage == 3 and layout.offload_optimizer):
            other = replace(layout, zero_stage=stage, micro_batches_in_flight=in_flight)
            memory = memory_per_gpu(config.model, other, kinds=kinds)
            stages[stage] = TimedLayout(other, clock.step(other), sum(memory.values()))
    return stages


def _check_inputs(config: Config, *, gpus: int, mfu: float | None, tokens: float | None) -> None:
    if gpus < 1:
        raise ConfigError(f"plan: --gpus: {gpus} is not a number of GPUs; give 1 or more")
    if mfu is not None and not 0 < mfu <= 1:
        raise ConfigError(f"plan: --mfu: {mfu} is not a utilisation; give a fraction such as 0.3")
    if tokens is not None and not (tokens > 0 and math.isfinite(tokens)):
        raise ConfigError(f"plan: --tokens: {tokens} is not a number of tokens; give one such as 1e12")
    validate_for_world(config, gpus)
