"""Layouts near a given one that fit a device, and what each sends over the links."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from qwen3next_train.accounting.activations import kv_heads_exchanged, passed_state_bytes, rows_sent_per_token
from qwen3next_train.accounting.flops import count_mixers
from qwen3next_train.accounting.hardware import Device
from qwen3next_train.accounting.layout import FP32_BYTES, Layout
from qwen3next_train.accounting.memory import ParameterKind, host_bytes_per_gpu, memory_per_gpu
from qwen3next_train.config.schema import Config, ModelConfig, MomentsDtype, OptimizerConfig, RecomputePart
from qwen3next_train.config.validate import MAX_BF16_BETA, context_fits

CHEAP_PARTS: tuple[RecomputePart, ...] = ("norms", "activations", "gdn_prologue")
"""Recompute without large matrix products: cheaper than keeping the results."""
USABLE_FRACTION = 0.95
"""Share of the device memory a plan may fill; the allocator loses the rest to fragmentation."""
INTER_NODE_BYTES_PER_S = 50 * 10**9
"""Network bandwidth per GPU between NVLink domains, one direction: 400 Gbit/s, the usual for these nodes."""
HOST_BYTES_PER_S = 30 * 10**9
"""Rate of one GPU's share of its host at copying to and from the GPU and updating weights: PCIe or memory."""

_WHOLE_LAYERS: frozenset[RecomputePart] = frozenset(("layer",))
_EVEN_EXPERTS = 8  # with fewer on a rank, the allowance for imbalance is too small
_LEAST_SLICE = 4096  # tokens; shorter slices of rows spend more time on exchanges than other ways to save memory
_MAX_LAYOUTS = 3
_FACTORS = (2, 4, 8, 16, 32)
_ZERO_STAGES: tuple[Literal[1, 2, 3], ...] = (1, 2, 3)


@dataclass(frozen=True)
class Traffic:
    """What one GPU sends per optimizer step, in bytes, and the seconds that takes at full link speed.

    Args:
        all_to_all_bytes: expert dispatch and combine, forward, recompute and backward, one copy per token and rank.
        all_to_all_s: at the link's rate within a domain, at the network's beyond, both at a time.
        context_bytes: heads of attention and states of Gated DeltaNet between the ranks that share rows, in all passes.
        context_s: at the same rates.
        state_bytes: gradient reduction and weight gathering of ZeRO.
        state_s: at the link's rate when the run is one domain, else at the network's.
        host_s: of an offloaded optimizer: gradients down, update in host memory, weights up.
    """

    all_to_all_bytes: int
    all_to_all_s: float
    context_bytes: int
    context_s: float
    state_bytes: int
    state_s: float
    host_s: float

    @property
    def total_s(self) -> float:
        """Seconds if nothing overlaps."""
        return self.all_to_all_s + self.context_s + self.state_s + self.host_s


def fits_device(memory_by_part: dict[str, int], device: Device) -> bool:
    """Whether the parts leave the device its margin."""
    return sum(memory_by_part.values()) <= USABLE_FRACTION * device.memory_bytes


def layouts_that_fit(
    config: Config, layout: Layout, device: Device, kinds: Counter[ParameterKind], *, layers_again_s: float
) -> tuple[Layout, ...]:
    """A few layouts that fit, best first (:func:`_rank`).

    Layouts on the same GPUs are looked at first, then more GPUs, last shorter rows. An offloaded optimizer is slow
    enough for layouts on more GPUs to be named as well.

    Args:
        config: the configuration; its global batch must divide.
        layout: one that does not fit.
        device: what it should fit on.
        kinds: :func:`~qwen3next_train.accounting.memory.parameter_kinds` of the model.
        layers_again_s: seconds of a step on these GPUs that recomputing whole layers would add.
    """
    more_gpus = (replace(layout, world_size=layout.world_size * factor) for factor in (1, *_FACTORS))
    shorter = (
        replace(layout, sequence_length=layout.sequence_length // factor)
        for factor in _FACTORS
        if layout.sequence_length >= factor
    )
    found: list[Layout] = []
    for start in (*more_gpus, *shorter):
        again_s = layers_again_s * layout.world_size / start.world_size
        fitting = [
            (_rank(config, layout, candidate, device, kinds, again_s), index, candidate)
            for index, candidate in enumerate(_neighbours(config, start))
            if fits_device(memory_per_gpu(config.model, candidate, kinds=kinds), device)
        ]
        ranked = [candidate for _, _, candidate in sorted(fitting)]
        if found:
            # So far all are offloaded.
            ranked = _distinct(layout, [candidate for candidate in ranked if not candidate.offload_optimizer])
            if ranked or start.sequence_length != layout.sequence_length:
                return (found[0], *ranked[: _MAX_LAYOUTS - 1])
            continue
        found = _distinct(layout, ranked)[:_MAX_LAYOUTS]
        if found and (layout.offload_optimizer or not found[0].offload_optimizer):
            return tuple(found)
    return tuple(found)


def _distinct(layout: Layout, ranked: Sequence[Layout]) -> list[Layout]:
    """Those that do not merely change more than a better one does."""
    chosen: list[Layout] = []
    for candidate in ranked:
        changes = changed_fields(layout, candidate)
        if not any(changed_fields(layout, better) <= changes for better in chosen):
            chosen.append(candidate)
    return chosen


def changed_fields(old: Layout, new: Layout) -> set[tuple[str, object]]:
    """Fields of ``new`` that differ, with their values."""
    before, after = vars(old), vars(new)
    return {(name, value) for name, value in after.items() if value != before[name]}


def traffic_per_step(config: Config, layout: Layout, device: Device, kinds: Counter[ParameterKind]) -> Traffic:
    """Bytes and seconds of plain collectives; nothing is assumed to overlap. Arguments as above."""
    num_micro_batches = layout.num_micro_batches(config.run.global_batch_size)
    all_to_all_bytes, all_to_all_s = _all_to_all(config.model, layout, device, num_micro_batches)
    context_bytes, context_s = _context(config.model, layout, device, num_micro_batches)
    state_bytes, state_s = _state(kinds, layout, device, num_micro_batches)
    # All that lies there is read and written once a step.
    host_bytes = 2 * host_bytes_per_gpu(config.model, layout, kinds=kinds)
    host_s = host_bytes / HOST_BYTES_PER_S
    return Traffic(all_to_all_bytes, all_to_all_s, context_bytes, context_s, state_bytes, state_s, host_s)


def _all_to_all(model: ModelConfig, layout: Layout, device: Device, num_micro_batches: int) -> tuple[int, float]:
    """Bytes of dispatch and combine in all passes; those for another domain go by the network, at the same time."""
    size = layout.expert_parallel_size
    passes = _passes(layout)
    crossings = 2 * passes * (model.num_hidden_layers + model.mtp_num_layers) * rows_sent_per_token(model, layout)
    rows = int(crossings * layout.num_tokens * num_micro_batches)
    sent = rows * model.hidden_size * layout.element_bytes // size
    return sent * (size - 1), _seconds(sent, size, device)


def _context(model: ModelConfig, layout: Layout, device: Device, num_micro_batches: int) -> tuple[int, float]:
    """Bytes between the ranks that share rows: heads there and back, and each rank's states to all others."""
    size = layout.context_parallel_size
    if size == 1:
        return 0, 0.0
    gdn_layers, attention_layers = count_mixers(model)
    heads = 2 * (model.num_attention_heads + kv_heads_exchanged(model, size))
    head_bytes = layout.num_tokens * heads * model.head_dim * layout.element_bytes // size
    state_bytes = passed_state_bytes(model, layout.micro_batch_size)
    to_each = (attention_layers + model.mtp_num_layers) * head_bytes + gdn_layers * state_bytes
    sent = _passes(layout) * num_micro_batches * to_each
    return sent * (size - 1), _seconds(sent, size, device)


def _passes(layout: Layout) -> int:
    """How often a layer sends: forward, backward, and forward again."""
    return 3 if "layer" in layout.recompute else 2


def _seconds(to_each: int, size: int, device: Device) -> float:
    """Seconds to send so many bytes to each of a group's other ranks, consecutive ones in a domain."""
    near = min(size, device.domain_size) - 1
    far = size - 1 - near
    return max(to_each * near / device.link_bytes_per_s, to_each * far / _network_rate(device, 1))


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
    """Layouts on as many GPUs, with any expert-parallel size and stage that work and no less done to save memory."""
    common = math.gcd(layout.world_size, config.model.num_experts)
    for share, expert_parallel_size, zero_stage, recompute, moments_dtype, offload in product(
        _shares(config, layout),
        (size for size in range(1, common + 1) if common % size == 0),
        _ZERO_STAGES,
        sorted({layout.recompute, layout.recompute.union(CHEAP_PARTS), layout.recompute | _WHOLE_LAYERS}, key=len),
        _moments_dtypes(config.optimizer, layout.moments_dtype),
        sorted({layout.offload_optimizer, True}),
    ):
        if offload and zero_stage == 3:
            continue  # a combination that config.validate rejects
        yield replace(
            layout,
            expert_parallel_size=expert_parallel_size,
            context_parallel_size=share[0],
            zero_stage=zero_stage,
            micro_batch_size=share[1],
            recompute=recompute,
            moments_dtype=moments_dtype,
            offload_optimizer=offload,
        )


def _shares(config: Config, layout: Layout) -> Iterator[tuple[int, int]]:
    """Context-parallel sizes, no smaller than the layout's, and micro-batch sizes. Only single rows are cut further."""
    sizes = {*range(1, layout.micro_batch_size + 1), *(layout.micro_batch_size * factor for factor in _FACTORS)}
    for factor in (1, *_FACTORS[:-1]):
        context = layout.context_parallel_size * factor
        ranks, rest = divmod(layout.world_size, context)
        if rest or config.run.global_batch_size % ranks:
            continue
        if not context_fits(config.model, layout.sequence_length, context):
            continue
        if factor > 1 and layout.sequence_length // context < _LEAST_SLICE:
            continue
        rows = config.run.global_batch_size // ranks
        for size in sorted(sizes) if factor == 1 else (1,):
            if rows % size == 0:
                yield context, size


def _moments_dtypes(optimizer: OptimizerConfig, current: MomentsDtype) -> list[MomentsDtype]:
    """The dtype that is asked for, and bf16 where it can follow the moments' decay."""
    if current == "bf16" or max(optimizer.beta1, optimizer.beta2) > MAX_BF16_BETA:
        return [current]
    return [current, "bf16"]


def _rank(
    config: Config,
    layout: Layout,
    near: Layout,
    device: Device,
    kinds: Counter[ParameterKind],
    layers_again_s: float,
) -> tuple[bool, bool, bool, float, int]:
    """Sort key: an even load first; no offload; moments as precise as asked for; then seconds that are spent on
    sending and on computing again, where a tenth more or less does not count; then the number of changed settings.
    """
    seconds = traffic_per_step(config, near, device, kinds).total_s
    if "layer" in near.recompute:
        seconds += layers_again_s
    uneven = config.model.num_experts // near.expert_parallel_size < _EVEN_EXPERTS
    tenths = round(math.log(max(seconds, 1e-9), 1.1))
    rougher = near.moments_dtype != layout.moments_dtype
    return uneven, near.offload_optimizer, rougher, tenths, len(changed_fields(layout, near))
