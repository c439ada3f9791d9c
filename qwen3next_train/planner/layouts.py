"""Layouts near a given one that fit a device, and what each sends over the links."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from qwen3next_train.accounting.hardware import Device
from qwen3next_train.accounting.memory import Layout, ParameterKind, memory_per_gpu
from qwen3next_train.config.schema import Config

USABLE_FRACTION = 0.95
"""Share of the device memory a plan may fill; the allocator loses the rest to fragmentation."""
INTER_NODE_BYTES_PER_S = 50 * 10**9
"""Network bandwidth per GPU between NVLink domains, one direction: 400 Gbit/s, the usual for these nodes."""

_MAX_LAYOUTS = 3
_FACTORS = (2, 4, 8, 16, 32)
_ZERO_STAGES: tuple[Literal[1, 2, 3], ...] = (1, 2, 3)
_FP32_BYTES = 4


@dataclass(frozen=True)
class Traffic:
    """What one GPU sends per optimizer step, in bytes, and the seconds that takes at full link speed.

    Args:
        all_to_all_bytes: expert dispatch and combine, forward and backward, one copy per chosen expert.
        all_to_all_s: at the link's rate if an expert-parallel group fits one domain, else at the network's.
        state_bytes: gradient reduction and weight gathering of ZeRO.
        state_s: at the network's rate when the run spans domains, else at the link's.
    """

    all_to_all_bytes: int
    all_to_all_s: float
    state_bytes: int
    state_s: float


def usable_bytes(device: Device) -> float:
    """Bytes of the device that a plan may fill."""
    return USABLE_FRACTION * device.memory_bytes


def layouts_that_fit(
    config: Config, layout: Layout, device: Device, kinds: Counter[ParameterKind]
) -> tuple[Layout, ...]:
    """A few layouts that fit, fewest changed settings first, then the one that spends the least time sending.

    Layouts on the same GPUs are looked at first, then more GPUs, last shorter rows.

    Args:
        config: the configuration; its global batch must divide.
        layout: one that does not fit.
        device: what it should fit on.
        kinds: :func:`~qwen3next_train.accounting.memory.parameter_kinds` of the model.
    """
    more_gpus = (replace(layout, world_size=layout.world_size * factor) for factor in (1, *_FACTORS))
    shorter = (
        replace(layout, sequence_length=layout.sequence_length // factor)
        for factor in _FACTORS
        if layout.sequence_length >= factor
    )
    for start in (*more_gpus, *shorter):
        fitting = [
            candidate
            for candidate in _neighbours(config, start)
            if sum(memory_per_gpu(config.model, candidate, kinds=kinds).values()) <= usable_bytes(device)
        ]
        if fitting:
            ranked = sorted(fitting, key=lambda near: _cost(config, layout, near, device, kinds))
            return tuple(ranked[:_MAX_LAYOUTS])
    return ()


def traffic_per_step(config: Config, layout: Layout, device: Device, kinds: Counter[ParameterKind]) -> Traffic:
    """Bytes and seconds of plain collectives; nothing is assumed to overlap. Arguments as above."""
    model = config.model
    num_micro_batches = config.run.global_batch_size // (layout.world_size * layout.micro_batch_size)
    elsewhere = layout.num_tokens * num_micro_batches * (layout.expert_parallel_size - 1)
    crossings = 4 * (model.num_hidden_layers + model.mtp_num_layers) * model.num_experts_per_tok
    all_to_all = crossings * elsewhere * model.hidden_size * _element_bytes(layout) // layout.expert_parallel_size
    state = _state_bytes(kinds, layout, num_micro_batches)
    link, network = device.link_bytes_per_s, min(INTER_NODE_BYTES_PER_S, device.link_bytes_per_s)
    return Traffic(
        all_to_all_bytes=all_to_all,
        all_to_all_s=all_to_all / (link if layout.expert_parallel_size <= device.domain_size else network),
        state_bytes=state,
        state_s=state / (link if layout.world_size <= device.domain_size else network),
    )


def _element_bytes(layout: Layout) -> int:
    return 2 if layout.precision == "bf16" else _FP32_BYTES


def _neighbours(config: Config, layout: Layout) -> Iterator[Layout]:
    """Valid layouts on as many GPUs with any expert-parallel size and stage and no larger a micro-batch."""
    common = math.gcd(layout.world_size, config.model.num_experts)
    for micro_batch_size in range(1, layout.micro_batch_size + 1):
        if config.run.global_batch_size % (layout.world_size * micro_batch_size):
            continue
        for expert_parallel_size in (size for size in range(1, common + 1) if common % size == 0):
            for zero_stage in _ZERO_STAGES:
                yield replace(
                    layout,
                    expert_parallel_size=expert_parallel_size,
                    zero_stage=zero_stage,
                    micro_batch_size=micro_batch_size,
                )


def _cost(
    config: Config, layout: Layout, near: Layout, device: Device, kinds: Counter[ParameterKind]
) -> tuple[int, float]:
    changed = sum(
        (
            layout.expert_parallel_size != near.expert_parallel_size,
            layout.zero_stage != near.zero_stage,
            layout.micro_batch_size != near.micro_batch_size,
        )
    )
    traffic = traffic_per_step(config, near, device, kinds)
    return changed, traffic.all_to_all_s + traffic.state_s


def _state_bytes(kinds: Counter[ParameterKind], layout: Layout, num_micro_batches: int) -> int:
    """ZeRO's bytes: stage 1 once a step, stage 2 its gradients and stage 3 everything every micro-batch."""
    element_bytes = _element_bytes(layout)
    # Gradients travel in fp32, all-reduced (twice the bytes of a reduce-scatter) under stages 1 and 2; weights are
    # gathered once a step, under stage 3 for the forward and for the backward pass.
    per_element = {
        1: 2 * _FP32_BYTES + element_bytes,
        2: 2 * _FP32_BYTES * num_micro_batches + element_bytes,
        3: num_micro_batches * (2 * element_bytes + _FP32_BYTES),
    }[layout.zero_stage]
    sent = 0
    for kind, count in kinds.items():
        sets = layout.expert_parallel_size if kind.num_experts else 1
        ranks = layout.world_size // sets
        sent += count * kind.numel // sets * (ranks - 1) // ranks
    return sent * per_element
