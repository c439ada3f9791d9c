"""Memory of one GPU by part, in bytes, for a layout of processes, experts and ZeRO.

Model states follow what DeepSpeed 0.19.8 allocates for the engine's set-up (its ``bf16`` mode off, the model cast
by us, ``grad_accum_dtype: fp32``), measured on its tensors:

* weights: the parameter's dtype, bf16 except fp32-flagged parameters in bf16 runs; whole under stages 1 and 2;
* gradients: fp32 in every run; whole under stage 1, this rank's partition under stages 2 and 3;
* optimizer: fp32 master, exp_avg and exp_avg_sq of this rank's partition. The master is a copy in fp32 runs too.

Dense parameters are partitioned over all ranks, experts over the ranks that hold the same experts. Stages 1 and 2
flatten an optimizer group and pad it to twice its number of ranks; stage 3 pads every parameter. Not counted:
Adam's step counters (4 bytes a group), the further padding where DeepSpeed cuts expert groups at 179 M elements,
and, under stage 2 in fp32, the rest of the tensors that straddle a partition's ends.

Activations, which come on top, are the matter of :mod:`qwen3next_train.accounting.activations`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import NamedTuple

from qwen3next_train.accounting.activations import Recompute, activation_bytes
from qwen3next_train.accounting.layout import FP32_BYTES, Layout
from qwen3next_train.accounting.params import parameter_table
from qwen3next_train.config.schema import ModelConfig
from qwen3next_train.topology import Topology

REDUCE_BUCKET_NUMEL = 200_000_000
"""Elements of ZeRO's gradient bucket."""
RUNTIME_BYTES = 2 * 2**30
"""CUDA context, NCCL channels and cuBLAS workspaces of a process."""
ADAM_STATE_BYTES = 12
"""Master weight and two moments, fp32, per parameter."""

# DeepSpeed's defaults under stage 3: smaller parameters stay gathered, and at most so many are gathered at once.
_STAGE3_PERSISTENCE_THRESHOLD = 100_000
_STAGE3_MAX_LIVE_PARAMETERS = 1_000_000_000


class ParameterKind(NamedTuple):
    """What decides how much of a parameter a rank holds, and as what.

    Args:
        numel: elements, all experts included.
        num_experts: experts stacked in it, 0 for a dense parameter.
        fp32: fp32 even in bf16 runs.
        decays: takes weight decay.
    """

    numel: int
    num_experts: int
    fp32: bool
    decays: bool


@dataclass(frozen=True)
class _Shard:
    """Parameters that are sharded alike: ``numel`` held by a rank before ZeRO, ``num_ranks`` that share them."""

    numel: int
    num_ranks: int
    element_bytes: int

    @property
    def partition(self) -> int:
        """Elements of one rank's partition when flattened with DeepSpeed's alignment."""
        return 2 * -(-self.numel // (2 * self.num_ranks))

    @property
    def stage3_partition(self) -> int:
        """Elements of one rank's piece of a single parameter under stage 3."""
        return -(-self.numel // self.num_ranks)


def parameter_kinds(model: ModelConfig) -> Counter[ParameterKind]:
    """The parameter table as a few kinds and how often each occurs: the 80B's 900 parameters are 20 kinds."""
    return Counter(
        ParameterKind(spec.numel, spec.shape[0] if spec.expert else 0, spec.fp32, spec.decay or spec.qk_norm)
        for spec in parameter_table(model)
    )


def memory_per_gpu(
    model: ModelConfig,
    layout: Layout,
    *,
    kinds: Counter[ParameterKind] | None = None,
    recompute: Recompute = "none",
) -> dict[str, int]:
    """Bytes on one GPU at the fullest moment of a step, by part; their sum is the total.

    Args:
        model: shape of the model.
        layout: processes, experts, ZeRO stage, precision and micro-batch.
        kinds: :func:`parameter_kinds` of the model, for a caller that tries many layouts.
        recompute: what of the activations is computed again in the backward pass.

    Returns:
        ``weights``, ``gradients``, ``optimizer``, ``zero_buffers`` (gradient bucket and, under stage 3, gathered
        weights), the parts of :func:`~qwen3next_train.accounting.activations.activation_bytes`, ``optimizer_step``
        (the step's flat gradient copy, as far as it exceeds the activations, which are gone by then) and ``runtime``.

    Raises:
        ConfigError: when the expert-parallel size divides neither the world size nor the experts.
    """
    states = _model_states(parameter_kinds(model) if kinds is None else kinds, layout)
    activations = activation_bytes(model, layout, recompute)
    step_copy = states["optimizer"] * FP32_BYTES // ADAM_STATE_BYTES
    return {
        **states,
        **activations,
        "optimizer_step": max(0, step_copy - sum(activations.values())),
        "runtime": RUNTIME_BYTES,
    }


def _model_states(kinds: Counter[ParameterKind], layout: Layout) -> dict[str, int]:
    """Weights, gradients, optimizer and ZeRO's buffers."""
    gradient_in_flight = max(_shard(kind, kind.numel, layout).numel for kind in kinds) * layout.element_bytes
    if layout.zero_stage == 3:
        return _stage3_states(kinds, gradient_in_flight, layout)
    shards = _flat_groups(kinds, layout)
    partitions = sum(shard.partition for shard in shards)
    whole = sum(shard.numel for shard in shards)
    # The wire is fp32. Stage 1 fills its bucket from fp32 accumulators; stage 2 from each micro-batch's gradients in
    # the parameters' dtype, and copies the bucket to fp32 to send it.
    copied = layout.zero_stage == 2 and layout.precision == "bf16"
    bucket_bytes = FP32_BYTES + (layout.element_bytes if copied else 0)
    return {
        "weights": sum(shard.partition * shard.num_ranks * shard.element_bytes for shard in shards),
        "gradients": FP32_BYTES * (whole if layout.zero_stage == 1 else partitions),
        "optimizer": ADAM_STATE_BYTES * partitions,
        "zero_buffers": REDUCE_BUCKET_NUMEL * bucket_bytes + gradient_in_flight,
    }


def _stage3_states(kinds: Counter[ParameterKind], gradient_in_flight: int, layout: Layout) -> dict[str, int]:
    shards = [(_shard(kind, kind.numel, layout), count) for kind, count in kinds.items()]
    partitions = sum(count * shard.stage3_partition for shard, count in shards)
    weights = sum(count * shard.stage3_partition * shard.element_bytes for shard, count in shards)
    persistent = sum(
        count * shard.numel * shard.element_bytes
        for shard, count in shards
        if shard.numel <= _STAGE3_PERSISTENCE_THRESHOLD
    )
    largest = max(shard.numel for shard, _ in shards)
    whole = sum(count * shard.numel for shard, count in shards)
    gathered = min(whole, max(_STAGE3_MAX_LIVE_PARAMETERS, largest)) * layout.element_bytes
    return {
        "weights": weights + persistent,
        "gradients": FP32_BYTES * partitions,
        "optimizer": ADAM_STATE_BYTES * partitions,
        "zero_buffers": REDUCE_BUCKET_NUMEL * FP32_BYTES + gradient_in_flight + gathered,
    }


def _shard(kind: ParameterKind, numel: int, layout: Layout) -> _Shard:
    """``numel`` elements, all experts included, of parameters that are treated like ``kind``."""
    element_bytes = FP32_BYTES if kind.fp32 else layout.element_bytes
    if not kind.num_experts:
        return _Shard(numel, layout.world_size, element_bytes)
    topology = Topology(layout.world_size, expert_parallel_size=layout.expert_parallel_size)
    local = numel // kind.num_experts * len(topology.local_experts(kind.num_experts))
    return _Shard(local, topology.expert_data_parallel_size, element_bytes)


def _flat_groups(kinds: Counter[ParameterKind], layout: Layout) -> list[_Shard]:
    """Optimizer groups: parameters of one dtype and decay, dense or experts, each flattened into one buffer."""
    groups: dict[tuple[bool, bool, bool], list[ParameterKind]] = defaultdict(list)
    for kind in kinds:
        groups[kind.fp32 and layout.precision == "bf16", kind.num_experts > 0, kind.decays].append(kind)
    return [_shard(group[0], sum(kinds[kind] * kind.numel for kind in group), layout) for group in groups.values()]
