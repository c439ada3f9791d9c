"""Layouts that fit a device: near a given one that does not, and the fastest there are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby, islice, product
from typing import Literal

from qwen3next_train.accounting.hardware import Device
from qwen3next_train.accounting.layout import Layout
from qwen3next_train.accounting.memory import ParameterKind, memory_per_gpu, state_bytes
from qwen3next_train.config.batch_size import common_batch_size
from qwen3next_train.config.schema import Config, MomentsDtype, OptimizerConfig, RecomputePart, TokenExchange
from qwen3next_train.config.validate import MAX_BF16_BETA
from qwen3next_train.config.validate_layout import context_fits, tensor_fits
from qwen3next_train.planner.step_time import StepClock, StepTime

CHEAP_PARTS: tuple[RecomputePart, ...] = ("norms", "activations", "gdn_prologue")
"""Recompute without large matrix products: cheaper than keeping the results."""
USABLE_FRACTION = 0.95
"""Share of the device memory a plan may fill; the allocator loses the rest to fragmentation."""
MAX_FASTEST = 5
"""Layouts that :func:`fastest_layouts` names."""

_WHOLE_LAYERS: frozenset[RecomputePart] = frozenset(("layer",))
_EVEN_EXPERTS = 8  # with fewer of them on a rank, but not all, the allowance for imbalance is too small
_LEAST_SLICE = 4096  # tokens; shorter slices of rows spend more time on exchanges than other ways to save memory
_MAX_LAYOUTS = 3
_FACTORS = (2, 4, 8, 16, 32)
MOST_TIMES_THE_GPUS = _FACTORS[-1]
"""How many times the GPUs are tried at most where a layout does not fit."""
_TENSOR_FACTORS = (1, 2, 4)
_OF_MICRO_BATCHES = frozenset(
    {
        "micro_batch_size",
        "micro_batches_in_flight",
        "sequence_length",
        "context_parallel_size",
        "recompute",
        "token_exchange",
    }
)
ZERO_STAGES: tuple[Literal[1, 2, 3], ...] = (1, 2, 3)
"""All of them."""


@dataclass(frozen=True)
class TimedLayout:
    """A layout and what it takes.

    Args:
        layout: the layout.
        step: time of a step.
        memory_bytes: bytes on one GPU.
    """

    layout: Layout
    step: StepTime
    memory_bytes: int


def fits_device(memory_bytes: int, device: Device) -> bool:
    """Whether so much leaves the device its margin."""
    return memory_bytes <= USABLE_FRACTION * device.memory_bytes


def layouts_that_fit(
    config: Config, layout: Layout, device: Device, kinds: Counter[ParameterKind], clock: StepClock
) -> tuple[Layout, ...]:
    """A few layouts that fit, best first (:func:`_ranked`).

    Layouts on the same GPUs are looked at first, then more GPUs, last shorter rows. An offloaded optimizer is slow
    enough for layouts on more GPUs to be named as well.

    Args:
        config: the configuration; the batch of every step must divide.
        layout: one that does not fit.
        device: what it should fit on.
        kinds: :func:`~qwen3next_train.accounting.memory.parameter_kinds` of the model.
        clock: tells the time of their steps.
    """
    more_gpus = (replace(layout, world_size=layout.world_size * factor) for factor in (1, *_FACTORS))
    shorter = (
        replace(layout, sequence_length=layout.sequence_length // factor)
        for factor in _FACTORS
        if layout.sequence_length >= factor
    )
    found: list[Layout] = []
    room = _Room(config, device, kinds)
    for start in (*more_gpus, *shorter):
        near = _neighbours(config, start)
        if found:
            # So far all are offloaded.
            near = (candidate for candidate in near if not candidate.offload_optimizer)
            others = list(islice(_distinct(layout, _ranked(config, layout, near, room, clock)), _MAX_LAYOUTS - 1))
            if others or start.sequence_length != layout.sequence_length:
                return (found[0], *others)
            continue
        found = list(islice(_distinct(layout, _ranked(config, layout, near, room, clock)), _MAX_LAYOUTS))
        if found and (layout.offload_optimizer or not found[0].offload_optimizer):
            return tuple(found)
    return tuple(found)


def most_gpus_tried(config: Config, layout: Layout) -> int:
    """The most GPUs that :func:`layouts_that_fit` looks at: :data:`MOST_TIMES_THE_GPUS` as many, or as many of these as
    the batch of every step divides over.
    """
    sizes = (layout.world_size * factor for factor in reversed(_FACTORS))
    tried = (size for size in sizes if any(_shares(config, replace(layout, world_size=size))))
    return next(tried, layout.world_size)


def fastest_layouts(
    config: Config,
    layout: Layout,
    device: Device,
    kinds: Counter[ParameterKind],
    clock: StepClock,
    progress: Callable[[int, int], None],
) -> tuple[TimedLayout, ...]:
    """The fastest layouts on the same GPUs that fit, the fastest first.

    They differ in what changes neither results nor what is stored: expert-, context- and tensor-parallel size (of the
    latter two also smaller ones than the layout's), ZeRO stage, micro-batch, micro-batches in flight, recompute and the
    exchange of tokens. Of each expert-parallel size, stage and number in flight the best one is named, and the best
    under stage 1 in any case. With bf16 gradients none is of stage 3.

    Args:
        config: the configuration; the batch of every step must divide.
        layout: its layout.
        device: what they should fit on.
        kinds: as of :func:`layouts_that_fit`.
        clock: tells the time of their steps.
        progress: is told how many of how many layouts have been looked at.
    """
    no_parts: frozenset[RecomputePart] = frozenset()
    recompute = dict.fromkeys((layout.recompute, no_parts, no_parts.union(CHEAP_PARTS), _WHOLE_LAYERS))
    whole_rows = replace(layout, context_parallel_size=1, tensor_parallel_size=1)
    shares = {*_shares(config, layout), *_shares(config, whole_rows)}
    candidates = [
        near
        for near in _same_states(config, layout, shares, recompute)
        if not _is_uneven(config, near) and near.gradient_dtype == layout.gradient_dtype
    ]
    timed = sorted(
        ((clock.step(near), len(changed_fields(layout, near)), index) for index, near in enumerate(candidates)),
        key=lambda found: (found[0].total_s, *found[1:]),
    )
    found: dict[tuple[int, int, int], TimedLayout] = {}
    room = _Room(config, device, kinds)
    for num_done, (step, _, index) in enumerate(timed):
        progress(num_done, len(timed))
        near = candidates[index]
        key = near.expert_parallel_size, near.zero_stage, near.micro_batches_in_flight
        if key in found:
            continue
        memory_bytes = room.memory_of(near)
        if memory_bytes is not None:
            found[key] = TimedLayout(near, step, memory_bytes)
    ranked = tuple(found.values())
    of_stage_1 = tuple(each for each in ranked[MAX_FASTEST:] if each.layout.zero_stage == 1)
    if of_stage_1 and not any(each.layout.zero_stage == 1 for each in ranked[:MAX_FASTEST]):
        return (*ranked[: MAX_FASTEST - 1], of_stage_1[0])
    return ranked[:MAX_FASTEST]


class _Room:
    """What layouts take on a device. States are counted once for all that differ in micro-batches alone: where nothing
    fits, tens of thousands are looked at.
    """

    def __init__(self, config: Config, device: Device, kinds: Counter[ParameterKind]) -> None:
        self._config, self._device, self._kinds = config, device, kinds
        self._states: dict[tuple[object, ...], dict[str, int]] = {}

    def memory_of(self, layout: Layout) -> int | None:
        """Bytes on one GPU; None where they do not fit."""
        key = tuple(value for name, value in vars(layout).items() if name not in _OF_MICRO_BATCHES)
        if key not in self._states:
            self._states[key] = state_bytes(self._config.model, layout, kinds=self._kinds)
        states = self._states[key]
        if not fits_device(sum(states.values()), self._device):
            return None
        memory_bytes = sum(memory_per_gpu(self._config.model, layout, kinds=self._kinds, states=states).values())
        return memory_bytes if fits_device(memory_bytes, self._device) else None


def _ranked(
    config: Config, layout: Layout, neighbours: Iterable[Layout], room: _Room, clock: StepClock
) -> Iterator[Layout]:
    """Those that fit, best first: an even load; no offload; moments as precise as asked for; then the time of a step,
    where a tenth more or less does not count, for as much work on as many GPUs; then the number of changed settings.
    """

    def precedence(near: Layout) -> tuple[bool, bool, bool]:
        return _is_uneven(config, near), near.offload_optimizer, near.moments_dtype != layout.moments_dtype

    def cost(near: Layout) -> tuple[int, int]:
        return round(math.log(clock.step(near).total_s, 1.1)), len(changed_fields(layout, near))

    # Memory and time take long to tell: those of the next group only where the one before is not enough.
    for _, alike in groupby(sorted(neighbours, key=precedence), precedence):
        yield from sorted((near for near in alike if room.memory_of(near) is not None), key=cost)


def _distinct(layout: Layout, ranked: Iterable[Layout]) -> Iterator[Layout]:
    """Those that do not merely change more than a better one does."""
    chosen: list[set[tuple[str, object]]] = []
    for candidate in ranked:
        changes = changed_fields(layout, candidate)
        if not any(better <= changes for better in chosen):
            chosen.append(changes)
            yield candidate


def changed_fields(old: Layout, new: Layout) -> set[tuple[str, object]]:
    """Fields of ``new`` that differ, with their values."""
    before, after = vars(old), vars(new)
    return {(name, value) for name, value in after.items() if value != before[name]}


def _neighbours(config: Config, layout: Layout) -> Iterator[Layout]:
    """Layouts on as many GPUs, with no less done to save memory."""
    more = sorted({layout.recompute, layout.recompute.union(CHEAP_PARTS), layout.recompute | _WHOLE_LAYERS}, key=len)
    for near, moments_dtype, offload in product(
        _same_states(config, layout, _shares(config, layout), more),
        _moments_dtypes(config.optimizer, layout.moments_dtype),
        sorted({layout.offload_optimizer, True}),
    ):
        if offload and near.zero_stage == 3:
            continue  # a combination that config.validate rejects
        if near.exchanges_densely and near.token_exchange != layout.token_exchange:
            continue  # takes more room
        yield _with_possible_gradients(replace(near, moments_dtype=moments_dtype, offload_optimizer=offload))


def _same_states(
    config: Config,
    layout: Layout,
    shares: Iterable[tuple[int, int, int]],
    recompute: Iterable[frozenset[RecomputePart]],
) -> Iterator[Layout]:
    """Layouts on as many GPUs, with any expert-parallel size, exchange, ZeRO stage and micro-batches that work."""
    common = math.gcd(layout.world_size, config.model.num_experts)
    for (context, tensor, micro_batch_size), expert_parallel_size, zero_stage, in_flight, parts in product(
        sorted(shares),
        (size for size in range(1, common + 1) if common % size == 0),
        ZERO_STAGES,
        (1, 2),
        recompute,
    ):
        # Without an exchange there is nothing to hide; config.validate rejects the other two.
        micro_batches = config.run.global_batch_size * context * tensor // (layout.world_size * micro_batch_size)
        if in_flight > 1 and (expert_parallel_size == 1 or zero_stage == 3 or micro_batches < in_flight):
            continue
        if layout.offload_optimizer and zero_stage == 3:
            continue
        near = replace(
            layout,
            expert_parallel_size=expert_parallel_size,
            context_parallel_size=context,
            tensor_parallel_size=tensor,
            zero_stage=zero_stage,
            micro_batch_size=micro_batch_size,
            micro_batches_in_flight=in_flight,
            recompute=parts,
        )
        for exchange in _exchanges(near):
            yield _with_possible_gradients(replace(near, token_exchange=exchange))


def _exchanges(layout: Layout) -> tuple[TokenExchange, ...]:
    """The layout's own exchange and the other one. All tokens to all ranks only inside a node, unless that is asked
    for: between nodes it sends several times what is needed.
    """
    own = layout.token_exchange
    if layout.exchanges_densely:
        return own, "exact"
    if layout.expert_parallel_size > 1 and layout.shares_experts_in_a_node:
        return own, "dense"
    return (own,)


def _with_possible_gradients(layout: Layout) -> Layout:
    """The layout with fp32 gradients where they are not summed in buckets, which alone can be of bf16."""
    return layout if layout.sums_in_buckets else replace(layout, gradient_dtype="fp32")


def _shares(config: Config, layout: Layout) -> Iterator[tuple[int, int, int]]:
    """Context- and tensor-parallel sizes, no smaller than the layout's, and micro-batch sizes. Only single rows are
    shared further.
    """
    batch, row = common_batch_size(config), layout.sequence_length
    most_rows = layout.micro_batch_size * _FACTORS[-1]
    for context_factor, tensor_factor in product((1, *_FACTORS[:-1]), _TENSOR_FACTORS):
        context = layout.context_parallel_size * context_factor
        tensor = layout.tensor_parallel_size * tensor_factor
        ranks, rest = divmod(layout.world_size, context * tensor)
        if rest or batch % ranks:
            continue
        if not (tensor_fits(config.model, row, tensor) and context_fits(config.model, row, context, tensor=tensor)):
            continue
        as_given = context_factor == tensor_factor == 1
        if not as_given and row // (context * tensor) < _LEAST_SLICE:
            continue
        rows = batch // ranks
        for size in range(1, min(rows, most_rows) + 1) if as_given else (1,):
            if rows % size == 0:
                yield context, tensor, size


def _moments_dtypes(optimizer: OptimizerConfig, current: MomentsDtype) -> list[MomentsDtype]:
    """The dtype that is asked for, and bf16 where it can follow the moments' decay."""
    if current == "bf16" or max(optimizer.beta1, optimizer.beta2) > MAX_BF16_BETA:
        return [current]
    return [current, "bf16"]


def _is_uneven(config: Config, layout: Layout) -> bool:
    ranks = layout.expert_parallel_size
    return ranks > 1 and config.model.num_experts // ranks < _EVEN_EXPERTS
