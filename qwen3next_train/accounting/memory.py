"""Memory of one GPU by part, in bytes, for a layout of processes, experts and ZeRO.

Model states follow what DeepSpeed 0.19.8 allocates for the engine's set-up (its ``bf16`` mode off, the model cast
by us, ``grad_accum_dtype: fp32``), measured on its tensors:

* weights: the parameter's dtype, bf16 except fp32-flagged parameters in bf16 runs; whole under stages 1 and 2;
* gradients: under stage 1 in buckets as long as the weights (``engine.gradient_buckets``), under stage 2 this rank's
  partition of them, both in ``parallel.gradient_dtype``; in fp32 the partition under stage 3, and with an offloaded
  optimizer all of them under stage 1 and the partition under stage 2;
* optimizer: fp32 master, exp_avg and exp_avg_sq (fp32 or bf16) of this rank's partition. The master is a copy in fp32
  runs too. Offloaded, which stage 3 does not have, it is in host memory, with an fp32 gradient and a copy of the
  weights in their dtype. The sums of micro-batches' gradients stay on the GPU, under stage 2 only in bf16 runs.

Dense parameters are partitioned over all ranks, experts over the ranks that hold the same experts, and what tensor
parallelism divides over those that hold the same heads. Stages 1 and 2
flatten an optimizer group and pad it to twice its number of ranks; stage 3 pads every parameter. Not counted:
Adam's step counters (4 bytes a group), the further padding of groups that are cut into several
(``engine.gradient_buckets.bucketed_groups``), and, under an offloaded stage 2 in fp32, the rest of the tensors that
straddle a partition's ends.

Buckets of stage 2 that ranks share are whole for a part of a backward pass only. Counted are as many as can be at a
time: the largest that is under way, two of each kind that fill, and the embedding's, which MTP fills from the
beginning of the pass.

Activations, which come on top, are the matter of :mod:`qwen3next_train.accounting.activations`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

from qwen3next_train.accounting.activations import activation_bytes
from qwen3next_train.accounting.layout import FP32_BYTES, Layout, bytes_of
from qwen3next_train.config.schema import Config, ModelConfig
from qwen3next_train.parameters import parameter_table
from qwen3next_train.topology import Topology

BUCKET_NUMEL = 100_000_000
"""Elements of an optimizer group whose gradients are summed in a bucket, unless one parameter has more."""
REDUCE_BUCKET_NUMEL = 200_000_000
"""Elements of DeepSpeed's gradient bucket."""
RUNTIME_BYTES = 2 * 2**30
"""CUDA context, NCCL channels and cuBLAS workspaces of a process."""
ADAM_STATE_BYTES = 12
"""Master weight and two moments, fp32, per parameter: what a checkpoint holds."""

# Input, position and targets of a token are 64-bit.
_BATCH_BYTES = 8
# DeepSpeed's default of the elements that stage 3 keeps gathered. Fewer would save memory and cost gathering.
_STAGE3_LIVE_NUMEL = 1_000_000_000


class ParameterKind(NamedTuple):
    """What decides how much of a parameter a rank holds, and as what.

    Args:
        numel: elements, all experts included.
        num_experts: experts stacked in it, 0 for a dense parameter.
        num_heads: heads of a mixer in it, 0 for what is the same for all heads.
        fp32: fp32 even in bf16 runs.
        decays: takes weight decay.
    """

    numel: int
    num_experts: int
    num_heads: int
    fp32: bool
    decays: bool


class Stage3Limits(NamedTuple):
    """What stage 3 is told of gathering, in elements of weights.

    Args:
        layer: of the largest decoder layer, which is gathered and reduced as a whole; gathered ahead of its use.
        reuse: gathered weights that are used again before so many others are kept.
        live: nothing is gathered ahead while so many are there.
    """

    layer: int
    reuse: int
    live: int


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


def persistent_numel(model: ModelConfig) -> int:
    """Elements up to which stage 3 keeps a parameter whole on every rank: vectors and convolutions, no matrices."""
    return 16 * model.hidden_size


def stage3_limits(model: ModelConfig, *, expert_parallel_size: int, tensor_parallel_size: int) -> Stage3Limits:
    """Limits under which the next layer can always be gathered while one computes.

    What is in no layer (embedding, head) stays gathered for the whole pass: DeepSpeed 0.19.8 counts how far off its
    next use is without the layers between. So there has to be room for it, the layer at work and the next one.

    Args:
        model: shape of the model.
        expert_parallel_size: ranks that share one set of experts.
        tensor_parallel_size: ranks that divide the mixers' heads.
    """
    layers = [*model.layer_types, *["full_attention"] * model.mtp_num_layers]
    # One layer of each type says it all, and the table of the others takes time.
    types = sorted(set(layers))
    table = parameter_table(
        model.model_copy(update={"num_hidden_layers": len(types), "layer_types": types, "mtp_num_layers": 0})
    )
    topology = Topology(
        expert_parallel_size * tensor_parallel_size,
        expert_parallel_size=expert_parallel_size,
        tensor_parallel_size=tensor_parallel_size,
    )
    held: Counter[str] = Counter()
    for spec in table:
        shares = 1
        if spec.expert:
            shares = expert_parallel_size
        elif spec.heads is not None:
            shares = topology.head_shares(spec.heads.count)
        _, _, behind = spec.name.partition("layers.")
        held[behind.split(".")[0]] += spec.numel // shares
    others = held.pop("") + (2 * model.hidden_size**2 if model.mtp_num_layers else 0)
    layer = max(held.values())
    live = max(_STAGE3_LIVE_NUMEL, others + 2 * layer)
    return Stage3Limits(layer, reuse=live - others - layer, live=live)


def parameter_kinds(model: ModelConfig) -> Counter[ParameterKind]:
    """The parameter table as a few kinds and how often each occurs: the 80B's 900 parameters are 20 kinds."""
    return Counter(
        ParameterKind(
            spec.numel,
            spec.shape[0] if spec.expert else 0,
            spec.heads.count if spec.heads else 0,
            spec.fp32,
            spec.decay or spec.qk_norm,
        )
        for spec in parameter_table(model)
    )


def num_shares(kind: ParameterKind, layout: Layout) -> int:
    """Equal shares of a parameter, of which a rank holds one.

    Raises:
        ConfigError: when the expert-parallel size divides neither the world size nor the experts.
    """
    sizes = (layout.world_size, layout.expert_parallel_size, layout.tensor_parallel_size)
    return _num_shares(kind.num_experts, kind.num_heads, *sizes)


@cache
def _num_shares(
    num_experts: int, num_heads: int, world_size: int, expert_parallel_size: int, tensor_parallel_size: int
) -> int:
    topology = Topology(
        world_size, expert_parallel_size=expert_parallel_size, tensor_parallel_size=tensor_parallel_size
    )
    if num_experts:
        return num_experts // len(topology.local_experts(num_experts))
    return topology.head_shares(num_heads) if num_heads else 1


def memory_per_gpu(
    model: ModelConfig,
    layout: Layout,
    *,
    kinds: Counter[ParameterKind] | None = None,
    states: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Bytes on one GPU at the fullest moment of a step, by part; their sum is the total.

    Args:
        model: shape of the model.
        layout: processes, experts, ZeRO stage, precision, micro-batch and what is kept.
        kinds: :func:`parameter_kinds` of the model, for a caller that tries many layouts.
        states: :func:`state_bytes` of the layout, where they are known.

    Returns:
        ``weights``, ``gradients``, ``optimizer``, ``zero_buffers`` (gradients on their way and, under stage 3, gathered
        weights), the parts of :func:`~qwen3next_train.accounting.activations.activation_bytes`, ``optimizer_step``
        (the step's flat gradient copy, as far as it exceeds the activations, which are gone by then), ``building``
        (under stage 3 a rank's weights are whole until they are partitioned: as far as that exceeds all parts but the
        runtime, none of which exists by then) and ``runtime``.

    Raises:
        ConfigError: when the expert-parallel size divides neither the world size nor the experts.
    """
    kinds = parameter_kinds(model) if kinds is None else kinds
    activations = activation_bytes(model, layout)
    parts = {
        **(state_bytes(model, layout, kinds=kinds) if states is None else states),
        **activations,
        "optimizer_step": max(0, _step_copy(kinds, layout) - sum(activations.values())),
    }
    building = max(0, _whole_weights(kinds, layout) - sum(parts.values())) if layout.zero_stage == 3 else 0
    return {**parts, "building": building, "runtime": RUNTIME_BYTES}


def state_bytes(model: ModelConfig, layout: Layout, *, kinds: Counter[ParameterKind]) -> dict[str, int]:
    """Of :func:`memory_per_gpu` weights, gradients, optimizer and buffers, which micro-batches do not change.

    Args:
        model: shape of the model.
        layout: as of :func:`memory_per_gpu`; micro-batches, rows, their slices, recompute and exchange do not matter.
        kinds: as of :func:`memory_per_gpu`.
    """
    return _stage3_states(model, kinds, layout) if layout.zero_stage == 3 else _model_states(model, kinds, layout)


def host_bytes_per_gpu(model: ModelConfig, layout: Layout, *, kinds: Counter[ParameterKind] | None = None) -> int:
    """Bytes of host memory of one process; 0 unless the optimizer is offloaded.

    Args:
        model: shape of the model.
        layout: as of :func:`memory_per_gpu`.
        kinds: as of :func:`memory_per_gpu`.
    """
    if not layout.offload_optimizer:
        return 0
    kinds = parameter_kinds(model) if kinds is None else kinds
    states = adam_state_bytes(layout) + FP32_BYTES
    shards = _flat_groups(kinds, layout)
    return sum(shard.partition * (states + shard.element_bytes) for shard in shards) + _largest_gradient(kinds, layout)


def snapshot_bytes_per_gpu(model: ModelConfig, layout: Layout, *, kinds: Counter[ParameterKind] | None = None) -> int:
    """Bytes of host memory from which one process writes checkpoints while training goes on, padding of ZeRO included.

    Args:
        model: shape of the model.
        layout: as of :func:`memory_per_gpu`.
        kinds: as of :func:`memory_per_gpu`.
    """
    kinds = parameter_kinds(model) if kinds is None else kinds
    return adam_state_bytes(layout) * _partition_numel(kinds, layout)


def certain_bytes(parts: Mapping[str, int]) -> int:
    """Bytes that one GPU has to have free: weights, gradients and optimizer, which are known to the byte.

    Not all that is planned: activations are what a micro-batch keeps at most, and runs whose peak was a fifth below
    the plan have been measured.

    Args:
        parts: of :func:`memory_per_gpu`.
    """
    return parts["weights"] + parts["gradients"] + parts["optimizer"]


def host_bytes(config: Config, layout: Layout, *, trains_on_host: bool) -> int:
    """Bytes of host memory that one process has to have free: prepared batches, and what the host keeps of the model.

    Args:
        config: the resolved configuration.
        layout: how it is spread.
        trains_on_host: the model is on the host too; else a GPU has it, but for an offloaded optimizer.
    """
    model, data = config.model, config.data
    # Those that wait, the one that is prepared and the one in use.
    num_steps = data.num_prefetch_steps + 2 if data.num_prefetch_steps else 1
    num_rows = num_steps * (config.run.global_batch_size // layout.data_parallel_size)
    if config.eval.interval:
        num_rows += config.eval.rows // layout.data_parallel_size
    num_tokens = num_rows * data.sequence_length // layout.ranks_per_row
    if layout.ranks_per_row > 1:
        # Rows are whole until they are cut.
        num_tokens += config.run.micro_batch_size * data.sequence_length
    batches = num_tokens * _BATCH_BYTES * (3 + model.mtp_num_layers)
    if not trains_on_host:
        return batches + host_bytes_per_gpu(model, layout)
    parts = memory_per_gpu(model, replace(layout, offload_optimizer=False))
    # No need of a host: room for experts that get more than their share, what a GPU's process holds before it starts,
    # and the gradient bucket, which is touched only as far as the model fills it.
    unused = ("imbalance", "runtime", "zero_buffers")
    return batches + sum(size for name, size in parts.items() if name not in unused)


def adam_state_bytes(layout: Layout) -> int:
    """Bytes of master weight and moments per parameter."""
    return FP32_BYTES + 2 * bytes_of(layout.moments_dtype)


def _model_states(model: ModelConfig, kinds: Counter[ParameterKind], layout: Layout) -> dict[str, int]:
    """Weights, gradients, optimizer and ZeRO's buffers, under stages 1 and 2."""
    gradient_in_flight = _largest_gradient(kinds, layout)
    shards = _flat_groups(kinds, layout)
    partitions = sum(shard.partition for shard in shards)
    whole = sum(shard.numel for shard in shards)
    if layout.sums_in_buckets:
        gradients = sum(
            shard.partition * (shard.num_ranks if layout.zero_stage == 1 else 1) * _gradient_bytes(shard, layout)
            for shard in shards
        )
        on_their_way = _lent_buckets(model, kinds, layout) if layout.zero_stage == 2 else 0
    else:
        # All that follows is of an offloaded optimizer.
        gradients = FP32_BYTES * (whole if layout.zero_stage == 1 else 0 if layout.precision == "fp32" else partitions)
        # Gradients are sent in fp32, from a flat copy of the bucket. Stage 2 does so in every backward pass, beside
        # activations; stage 1 at the end of the step's last, when they are gone.
        on_their_way = REDUCE_BUCKET_NUMEL * FP32_BYTES * (2 if layout.zero_stage == 2 else 1)
    return {
        "weights": sum(shard.partition * shard.num_ranks * shard.element_bytes for shard in shards),
        "gradients": gradients,
        "optimizer": 0 if layout.offload_optimizer else adam_state_bytes(layout) * partitions,
        # An offloaded optimizer's gradients pass through a buffer of the largest of them.
        "zero_buffers": on_their_way + gradient_in_flight * (1 + layout.offload_optimizer),
    }


def _gradient_bytes(shard: _Shard, layout: Layout) -> int:
    """Of an element in a bucket: weights in fp32 have gradients in fp32."""
    return max(bytes_of(layout.gradient_dtype), shard.element_bytes)


def _lent_buckets(model: ModelConfig, kinds: Counter[ParameterKind], layout: Layout) -> int:
    """Bytes of the buckets of stage 2 that are whole at a time, at most.

    Those under way are no more than the largest (``engine.gradient_buckets``). Beside them the layer at work fills two
    buckets of a kind, where one ends and the next begins, or one with each of its experts' weights if these are large.
    """
    lent, largest, filling, embedding = 0, 0, 0, 0
    for group in _grouped(kinds, layout):
        shard = _flat(group, kinds, layout)
        if shard.num_ranks == 1:
            continue
        element = _gradient_bytes(shard, layout)
        numels = [_shard(kind, kind.numel, layout).numel for kind in group]
        of_group, of_bucket = shard.partition * shard.num_ranks, max(BUCKET_NUMEL, *numels)
        of_layer = sum(numels) if group[0].num_experts else 0
        lent += of_group * element
        largest = max(largest, min(of_group, of_bucket) * element)
        filling += min(of_group, max(2 * BUCKET_NUMEL, of_layer)) * element
        if model.vocab_size * model.hidden_size in numels:
            embedding = min(of_group, of_bucket) * element
    # Without MTP the head's fills at the beginning, while the embedding's of the pass before is under way.
    from_the_beginning = model.mtp_num_layers > 0 or model.tie_word_embeddings
    return min(lent, largest + (embedding + filling if from_the_beginning else max(embedding, filling)))


def _largest_gradient(kinds: Counter[ParameterKind], layout: Layout) -> int:
    """Bytes of the largest gradient before it is summed, in the weights' dtype."""
    return max(_shard(kind, kind.numel, layout).numel for kind in kinds) * layout.element_bytes


def _partition_numel(kinds: Counter[ParameterKind], layout: Layout) -> int:
    """Elements whose optimizer state a rank holds."""
    if layout.zero_stage == 3:
        return sum(count * _shard(kind, kind.numel, layout).stage3_partition for kind, count in kinds.items())
    return sum(shard.partition for shard in _flat_groups(kinds, layout))


def _step_copy(kinds: Counter[ParameterKind], layout: Layout) -> int:
    """Bytes of the flat fp32 gradient that the step of an offloaded optimizer adds on the GPU.

    Under stage 2 in bf16 runs the sums are that gradient, in fp32 runs it is on the host; any other optimizer reads
    gradients where they were summed.
    """
    if layout.updates_in_one_pass or layout.zero_stage == 2 or layout.precision == "fp32":
        return 0
    return FP32_BYTES * _partition_numel(kinds, layout)


def _stage3_states(model: ModelConfig, kinds: Counter[ParameterKind], layout: Layout) -> dict[str, int]:
    limits = stage3_limits(
        model, expert_parallel_size=layout.expert_parallel_size, tensor_parallel_size=layout.tensor_parallel_size
    )
    shards = [(_shard(kind, kind.numel, layout), count) for kind, count in kinds.items()]
    partitions = sum(count * shard.stage3_partition for shard, count in shards)
    weights = sum(count * shard.stage3_partition * shard.element_bytes for shard, count in shards)
    # A rank that has its experts to itself has nothing to gather. The others' are gathered with their padding.
    spread = [(shard, count) for shard, count in shards if shard.num_ranks > 1]
    persistent = sum(
        count * shard.stage3_partition * shard.num_ranks * shard.element_bytes
        for shard, count in spread
        if shard.numel <= persistent_numel(model)
    )
    largest = max((shard.numel for shard, _ in spread), default=0)
    whole = sum(count * shard.numel for shard, count in spread)
    # Gradients of what only this rank has are summed where they are made, one placeholder at a time for autograd. The
    # others of a layer wait for one another, then as they are in the bucket until it is full; what is sent is a copy.
    own = [(shard, count) for shard, count in shards if shard.num_ranks == 1]
    own_in_layer = sum(count * shard.numel for shard, count in own) // (model.num_hidden_layers + model.mtp_num_layers)
    placeholder = max((shard.numel for shard, _ in own), default=0)
    in_bucket = min(whole, REDUCE_BUCKET_NUMEL)
    made = max(max(0, limits.layer - own_in_layer) + placeholder, largest)
    gradients_in_flight = layout.element_bytes * (in_bucket + made) + FP32_BYTES * max(in_bucket, largest)
    # A layer that was not gathered ahead is gathered beyond the limit.
    gathered = min(whole, limits.live + max(limits.layer, largest)) * layout.element_bytes
    return {
        "weights": weights + persistent,
        "gradients": FP32_BYTES * partitions,
        "optimizer": adam_state_bytes(layout) * partitions,
        "zero_buffers": gradients_in_flight + gathered,
    }


def _whole_weights(kinds: Counter[ParameterKind], layout: Layout) -> int:
    """Bytes of a rank's weights before ZeRO partitions them."""
    shards = [(_shard(kind, kind.numel, layout), count) for kind, count in kinds.items()]
    return sum(count * shard.numel * shard.element_bytes for shard, count in shards)


def _shard(kind: ParameterKind, numel: int, layout: Layout) -> _Shard:
    """``numel`` elements, all experts included, of parameters that are treated like ``kind``."""
    element_bytes = FP32_BYTES if kind.fp32 else layout.element_bytes
    shares = num_shares(kind, layout)
    return _Shard(numel // shares, layout.world_size // shares, element_bytes)


def _flat_groups(kinds: Counter[ParameterKind], layout: Layout) -> list[_Shard]:
    """Optimizer groups, each flattened into one buffer."""
    return [_flat(group, kinds, layout) for group in _grouped(kinds, layout)]


def _flat(group: Sequence[ParameterKind], kinds: Counter[ParameterKind], layout: Layout) -> _Shard:
    return _shard(group[0], sum(kinds[kind] * kind.numel for kind in group), layout)


def _grouped(kinds: Counter[ParameterKind], layout: Layout) -> Collection[list[ParameterKind]]:
    """Parameters of one dtype and decay that the same ranks share."""
    groups: dict[tuple[bool, bool, int, bool], list[ParameterKind]] = defaultdict(list)
    for kind in kinds:
        fp32, shares = kind.fp32 and layout.precision == "bf16", num_shares(kind, layout)
        groups[fp32, kind.num_experts > 0, shares, kind.decays].append(kind)
    return groups.values()
