"""Layouts near a given one that fit a device, and what each sends over the links."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from qwen3next_train.accounting.activations import Recompute
from qwen3next_train.accounting.hardware import Device, Precision
from qwen3next_train.accounting.layout import FP32_BYTES, Layout
from qwen3next_train.accounting.memory import ParameterKind, memory_per_gpu
from qwen3next_train.config.schema import Config, ModelConfig

USABLE_FRACTION = 0.95
"""Share of the device memory a plan may fill; the allocator loses the rest to fragmentation."""
INTER_NODE_BYTES_PER_S = 50 * 10**9
"""Network bandwidth per GPU between NVLink domains, one direction: 400 Gbit/s, the usual for these nodes."""

_EVEN_EXPERTS = 8  # with fewer on a rank, the allowance for imbalance is too small
_MAX_LAYOUTS = 3
_FACTORS = (2, 4, 8, 16, 32)
# DeepSpeed's stage 3 gathers tensors of one dtype only, and in bf16 the router, A_log and dt_bias are fp32.
_ZERO_STAGES: dict[Precision, tuple[Literal[1, 2, 3], ...]] = {"bf16": (1, 2), "fp32": (1, 2, 3)}


@dataclass(frozen=True)
class Traffic:
    """What one GPU sends per optimizer step, in bytes, and the seconds that takes at full link speed.

    Args:
        all_to_all_bytes: expert dispatch and combine, forward and backward, one copy per chosen expert.
        all_to_all_s: at the link's rate within a domain, at the network's beyond, both at a time.
        state_bytes: gradient reduction and weight gathering of ZeRO.
        state_s: at the link's rate when the run is one domain, else at the network's.
    """

    all_to_all_bytes: int
    all_to_all_s: float
    state_bytes: int
    state_s: float


def fits_device(memory_by_part: dict[str, int], device: Device) -> bool:
    """Whether the parts leave the device its margin."""
    return sum(memory_by_part.values()) <= USABLE_FRACTION * device.memory_bytes


def layouts_that_fit(
    config: Config, layout: Layout, device: Device, kinds: Counter[ParameterKind], *, recompute: Recompute = "none"
) -> tuple[Layout, ...]:
    """A few layouts that fit, fewest changed settings first, then the one that spends the least time sending.

    Layouts on the same GPUs are looked at first, then more GPUs, last shorter rows. Those that leave a rank only a
    few experts come after the others.

    Args:
        config: the configuration; its global batch must divide.
        layout: one that does not fit.
        device: what it should fit on.
        kinds: :func:`~qwen3next_train.accounting.memory.parameter_kinds` of the model.
        recompute: what of the activations is computed again.
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
            if fits_device(memory_per_gpu(config.model, candidate, kinds=kinds, recompute=recompute), device)
        ]
        if fitting:
            ranked = sorted(fitting, key=lambda near: _rank(config, layout, near, device, kinds))
            return tuple(ranked[:_MAX_LAYOUTS])
    return ()


def traffic_per_step(config: Config, layout: Layout, device: Device, kinds: Counter[ParameterKind]) -> Traffic:
    """Bytes and seconds of plain collectives; nothing is assumed to overlap. Arguments as above."""
    num_micro_batches = config.run.global_batch_size // (layout.world_size * layout.micro_batch_size)
    all_to_all_bytes, all_to_all_s = _all_to_all(config.model, layout, device, num_micro_batches)
    state_bytes, state_s = _state(kinds, layout, device, num_micro_batches)
    return Traffic(all_to_all_bytes, all_to_all_s, state_bytes, state_s)


def _all_to_all(model: ModelConfig, layout: Layout, device: Device, num_micro_batches: int) -> tuple[int, float]:
    """Bytes of dispatch and combine in both passes; those for another domain go by the network, at the same time."""
    size = layout.expert_parallel_size
    crossings = 4 * (model.num_hidden_layers + model.mtp_num_layers) * model.num_experts_per_tok
    rows = crossings * layout.num_tokens * num_micro_batches
    sent = rows * model.hidden_size * layout.element_bytes // size
    near = min(size, device.domain_size) - 1
    far = size - 1 - near
    return sent * (size - 1), max(sent * near / device.link_bytes_per_s, sent * far / _network_rate(device, 1))


def _state(kinds: Counter[ParameterKind], layout: Layout, device: Device, num_micro_batches: int) -> tuple[int, float]:
    """ZeRO's bytes: stage 1 once a step, stage 2 its gradients and stage 3 everything every micro-batch."""
    element_bytes = layout.element_bytes
    # Gradients travel in fp32, all-reduced (twice the bytes of a reduce-scatter) under stages 1 and 2; weights are
    # gathered once a step, under stage 3 for the forward and for the backward pass.
    per_element = {
        1: 2 * FP32_BYTES + element_bytes,
        2: 2 * FP32_BYTES * num_micro_batches + element_bytes,
        3: num_micro_batches * (2 * element_bytes + FP32_BYTES),
    }[layout.zero_stage]
    sent, seconds = 0, 0.0
    for kind, count in kinds.items():
        sets = layout.expert_parallel_size if kind.num_experts else 1
        ranks = layout.world_size // sets
        kind_bytes = per_element * (count * kind.numel // sets * (ranks - 1) // ranks)
        # The members of a group within one domain reduce among themselves first and share their network links.
        spans_domains = layout.world_size > device.domain_size
        rate = _network_rate(device, max(1, device.domain_size // sets)) if spans_domains else device.link_bytes_per_s
        sent, seconds = sent + kind_bytes, seconds + kind_bytes / rate
    return sent, seconds


def _network_rate(device: Device, num_links: int) -> int:
    """Bytes per second between domains through the network links of ``num_links`` GPUs."""
    return min(num_links * INTER_NODE_BYTES_PER_S, device.link_bytes_per_s)


def _neighbours(config: Config, layout: Layout) -> Iterator[Layout]:
    """Layouts on as many GPUs, of any expert-parallel size and stage that work, with no larger a micro-batch."""
    common = math.gcd(layout.world_size, config.model.num_experts)
    for micro_batch_size in range(1, layout.micro_batch_size + 1):
        if config.run.global_batch_size % (layout.world_size * micro_batch_size):
            continue
        for expert_parallel_size in (size for size in range(1, common + 1) if common % size == 0):
            for zero_stage in _ZERO_STAGES[layout.precision]:
                yield replace(
                    layout,
                    expert_parallel_size=expert_parallel_size,
                    zero_stage=zero_stage,
                    micro_batch_size=micro_batch_size,
                )


def _rank(
    config: Config, layout: Layout, near: Layout, device: Device, kinds: Counter[ParameterKind]
) -> tuple[bool, int, float]:
    """Sort key: an even load first, then the number of changed settings, then seconds spent sending."""
    changed = sum(
        (
            layout.expert_parallel_size != near.expert_parallel_size,
            layout.zero_stage != near.zero_stage,
            layout.micro_batch_size != near.micro_batch_size,
        )
    )
    traffic = traffic_per_step(config, near, device, kinds)
    uneven = config.model.num_experts // near.expert_parallel_size < _EVEN_EXPERTS
    return uneven, changed, traffic.all_to_all_s + traffic.state_s
