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

Activations are what autograd keeps of one micro-batch without recomputation; :func:`saved_tensors` lists them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from qwen3next_train.accounting.flops import count_mixers, gdn_dims, query_dim
from qwen3next_train.accounting.hardware import Precision
from qwen3next_train.accounting.params import parameter_table
from qwen3next_train.config.schema import ModelConfig
from qwen3next_train.topology import Topology

REDUCE_BUCKET_NUMEL = 200_000_000
"""Elements of ZeRO's gradient bucket."""
IMBALANCE_ALLOWANCE = 0.2
"""Rows above the mean that an expert-parallel rank is expected to receive, as a fraction."""
RUNTIME_BYTES = 2 * 2**30
"""CUDA context, NCCL channels and cuBLAS workspaces of a process."""
ADAM_STATE_BYTES = 12
"""Master weight and two moments, fp32, per parameter."""

_FP32_BYTES = 4
_GDN_CHUNK = 64
_CHUNK_LOGITS = 2**30  # what the linear_cross_entropy kernel holds at once on CUDA
# DeepSpeed's defaults under stage 3: smaller parameters stay gathered, and at most so many are gathered at once.
_STAGE3_PERSISTENCE_THRESHOLD = 100_000
_STAGE3_MAX_LIVE_PARAMETERS = 1_000_000_000

LayerKind = Literal["gdn", "attention", "moe", "other"]


@dataclass(frozen=True)
class Layout:
    """How a run is spread over GPUs.

    Args:
        world_size: GPUs, one process each.
        expert_parallel_size: ranks that share one set of experts.
        zero_stage: 1, 2 or 3.
        precision: dtype of weights and activations.
        micro_batch_size: rows per rank and forward pass.
        sequence_length: tokens per row.
    """

    world_size: int
    expert_parallel_size: int
    zero_stage: Literal[1, 2, 3]
    precision: Precision
    micro_batch_size: int
    sequence_length: int

    @property
    def num_tokens(self) -> int:
        """Tokens of a micro-batch on one rank."""
        return self.micro_batch_size * self.sequence_length


@dataclass(frozen=True)
class SavedTensor:
    """Something autograd keeps from the forward pass until the backward pass.

    Args:
        name: what it is.
        bytes_per_token: bytes per token that enters the layer.
        bytes_per_layer: bytes that do not depend on the number of tokens.
        routed: its rows are routed copies of tokens, so that it grows with expert imbalance.
    """

    name: str
    bytes_per_token: int
    bytes_per_layer: int = 0
    routed: bool = False

    def size(self, num_tokens: int) -> int:
        """Bytes of one layer for a micro-batch of ``num_tokens``."""
        return self.bytes_per_layer + self.bytes_per_token * num_tokens


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
    model: ModelConfig, layout: Layout, *, kinds: Counter[ParameterKind] | None = None
) -> dict[str, int]:
    """Bytes on one GPU at the fullest moment of a step, by part; their sum is the total.

    Args:
        model: shape of the model.
        layout: processes, experts, ZeRO stage, precision and micro-batch.
        kinds: :func:`parameter_kinds` of the model, for a caller that tries many layouts.

    Returns:
        ``weights``, ``gradients``, ``optimizer``, ``zero_buffers`` (gradient bucket and, under stage 3, gathered
        weights), ``activations_<kind>``, ``logits``, ``all_to_all``, ``imbalance``, ``optimizer_step`` (the step's
        flat gradient copy, as far as it exceeds the activations, which are gone by then) and ``runtime``.

    Raises:
        ConfigError: when the expert-parallel size divides neither the world size nor the experts.
    """
    states = _model_states(parameter_kinds(model) if kinds is None else kinds, layout)
    activations = activation_bytes(model, layout)
    step_copy = states["optimizer"] * _FP32_BYTES // ADAM_STATE_BYTES
    return {
        **states,
        **activations,
        "optimizer_step": max(0, step_copy - sum(activations.values())),
        "runtime": RUNTIME_BYTES,
    }


def activation_bytes(model: ModelConfig, layout: Layout) -> dict[str, int]:
    """Bytes of one micro-batch between forward and backward, by part: kinds of layer, logits, dispatch."""
    gdn_layers, attention_layers = count_mixers(model)
    depths = model.mtp_num_layers
    num_layers: dict[LayerKind, int] = {
        "gdn": gdn_layers,
        "attention": attention_layers + depths,
        "moe": model.num_hidden_layers + depths,
        "other": 1,
    }
    tokens = layout.num_tokens
    saved = saved_tensors(model, layout.precision)
    by_kind = {
        f"activations_{kind}": num_layers[kind] * sum(tensor.size(tokens) for tensor in tensors)
        for kind, tensors in saved.items()
    }
    routed = num_layers["moe"] * sum(tensor.size(tokens) for tensor in saved["moe"] if tensor.routed)
    exchange = _all_to_all(model, layout)
    uneven = routed + exchange if layout.expert_parallel_size > 1 else 0
    return {
        **by_kind,
        "logits": _logits(model, layout),
        "all_to_all": exchange,
        "imbalance": int(IMBALANCE_ALLOWANCE * uneven),
    }


def saved_tensors(model: ModelConfig, precision: Precision) -> dict[LayerKind, tuple[SavedTensor, ...]]:
    """What autograd keeps of each kind of layer when nothing is recomputed.

    Kernels (delta rule, convolution, attention, grouped products) keep their inputs; norms compute in fp32 from
    plain operations and keep their input and their normalised value. A recompute policy is a selection of these.
    """
    return {
        "gdn": _saved_gdn(model, _activation_bytes(precision)),
        "attention": _saved_attention(model, _activation_bytes(precision)),
        "moe": _saved_moe(model, _activation_bytes(precision)),
        "other": _saved_other(model, _activation_bytes(precision)),
    }


def _activation_bytes(precision: Precision) -> int:
    return 2 if precision == "bf16" else _FP32_BYTES


def _norm(name: str, width: int, element_bytes: int) -> tuple[SavedTensor, ...]:
    return (
        SavedTensor(f"{name} input and normalised, fp32", 2 * _FP32_BYTES * width),
        SavedTensor(f"{name} output", element_bytes * width),
    )


def _saved_gdn(model: ModelConfig, element_bytes: int) -> tuple[SavedTensor, ...]:
    key_dim, value_dim = gdn_dims(model)
    heads = model.linear_num_value_heads
    channels = 2 * key_dim + value_dim
    projected = 2 * key_dim + 2 * value_dim + 2 * heads
    return (
        *_norm("input_layernorm", model.hidden_size, element_bytes),
        SavedTensor("regrouped projection weights", 0, bytes_per_layer=element_bytes * projected * model.hidden_size),
        SavedTensor("convolution input", element_bytes * channels),
        SavedTensor("query, key, value", element_bytes * channels),
        SavedTensor("normalised query, key", element_bytes * 2 * key_dim),
        SavedTensor("decay and write strength, fp32", 2 * _FP32_BYTES * heads),
        SavedTensor("chunk matrix of the delta rule", element_bytes * heads * _GDN_CHUNK),
        SavedTensor("gated norm: input, normalised, weighted, gate, silu, fp32", 5 * _FP32_BYTES * value_dim),
        SavedTensor("output projection input", element_bytes * value_dim),
    )


def _saved_attention(model: ModelConfig, element_bytes: int) -> tuple[SavedTensor, ...]:
    queries, keys = query_dim(model), model.num_key_value_heads * model.head_dim
    # Without a cast the query norm keeps its input, a view that holds the gate's half of the projection too.
    held = element_bytes * queries if element_bytes == _FP32_BYTES else 0
    gate = (SavedTensor("sigmoid of the gate", element_bytes * queries), SavedTensor("gate", held))
    return (
        *_norm("input_layernorm", model.hidden_size, element_bytes),
        SavedTensor("q/k norm input and normalised, fp32", 2 * _FP32_BYTES * (queries + keys)),
        SavedTensor("query, key, value", element_bytes * (queries + 2 * keys)),
        SavedTensor("attention output", element_bytes * queries),
        SavedTensor("log-sum-exp, fp32", _FP32_BYTES * model.num_attention_heads),
        *(gate if model.attention_output_gate else ()),
        SavedTensor("output projection input", element_bytes * queries),
    )


def _saved_moe(model: ModelConfig, element_bytes: int) -> tuple[SavedTensor, ...]:
    hidden, ffn = model.hidden_size, model.moe_intermediate_size
    top_k, shared = model.num_experts_per_tok, model.shared_expert_intermediate_size
    shared_tensors = (
        SavedTensor("shared gate, up, silu and product", element_bytes * 4 * shared),
        SavedTensor("shared expert output", element_bytes * hidden),
    )
    # The router's fp32 input is a copy only where the activations are not fp32 already.
    router_input = _FP32_BYTES * hidden if element_bytes != _FP32_BYTES else 0
    router_outputs = 2 if model.router_z_loss_coef else 1
    return (
        *_norm("post_attention_layernorm", hidden, element_bytes),
        SavedTensor("router input, fp32", router_input),
        SavedTensor(
            "router probabilities and, for the z-loss, logits, fp32", router_outputs * _FP32_BYTES * model.num_experts
        ),
        SavedTensor("chosen experts, their weights and rows", 32 * top_k),
        SavedTensor("expert rows in and out", element_bytes * 2 * hidden * top_k, routed=True),
        SavedTensor("expert gate, up, silu and product", element_bytes * 4 * ffn * top_k, routed=True),
        *(shared_tensors if shared else ()),
    )


def _saved_other(model: ModelConfig, element_bytes: int) -> tuple[SavedTensor, ...]:
    final = _norm("norm", model.hidden_size, element_bytes)
    depth = (
        SavedTensor("mtp norms, fp32", 6 * _FP32_BYTES * model.hidden_size),
        SavedTensor("mtp fc input and norm output", 3 * element_bytes * model.hidden_size),
    )
    return final + depth * model.mtp_num_layers


def _logits(model: ModelConfig, layout: Layout) -> int:
    """Head and loss of the last depth, when the other depths' gradients already wait for the backward pass.

    A chunk holds fp32 logits and their log-softmax. Each use of the head leaves a weight gradient and a gradient of
    its input in the activations' dtype; the one under way sums its weight gradient in fp32.
    """
    tokens = min(layout.num_tokens, max(_CHUNK_LOGITS // model.vocab_size, 1))
    chunk = tokens * model.vocab_size * 2 * _FP32_BYTES
    element_bytes = _activation_bytes(layout.precision)
    weight = model.vocab_size * model.hidden_size
    waiting = element_bytes * (weight + layout.num_tokens * model.hidden_size)
    return chunk + weight * (_FP32_BYTES + element_bytes) + waiting * model.mtp_num_layers


def _all_to_all(model: ModelConfig, layout: Layout) -> int:
    """Send and receive buffer of one layer's dispatch, one copy of a token per chosen expert."""
    if layout.expert_parallel_size == 1:
        return 0
    row = model.hidden_size * _activation_bytes(layout.precision)
    return 2 * layout.num_tokens * model.num_experts_per_tok * row


def _model_states(kinds: Counter[ParameterKind], layout: Layout) -> dict[str, int]:
    """Weights, gradients, optimizer and ZeRO's buffers."""
    gradient_in_flight = max(_shard([kind], layout).numel for kind in kinds) * _activation_bytes(layout.precision)
    if layout.zero_stage == 3:
        return _stage3_states(kinds, gradient_in_flight, layout)
    shards = _flat_groups(kinds, layout)
    partitions = sum(shard.partition for shard in shards)
    whole = sum(shard.numel for shard in shards)
    # The wire is fp32. Stage 1 fills its bucket from fp32 accumulators; stage 2 from each micro-batch's gradients in
    # the parameters' dtype, and copies the bucket to fp32 to send it.
    copied = layout.zero_stage == 2 and layout.precision == "bf16"
    bucket_bytes = _FP32_BYTES + (_activation_bytes(layout.precision) if copied else 0)
    return {
        "weights": sum(shard.partition * shard.num_ranks * shard.element_bytes for shard in shards),
        "gradients": _FP32_BYTES * (whole if layout.zero_stage == 1 else partitions),
        "optimizer": ADAM_STATE_BYTES * partitions,
        "zero_buffers": REDUCE_BUCKET_NUMEL * bucket_bytes + gradient_in_flight,
    }


def _stage3_states(kinds: Counter[ParameterKind], gradient_in_flight: int, layout: Layout) -> dict[str, int]:
    shards = [(_shard([kind], layout), count) for kind, count in kinds.items()]
    partitions = sum(count * shard.stage3_partition for shard, count in shards)
    weights = sum(count * shard.stage3_partition * shard.element_bytes for shard, count in shards)
    persistent = sum(
        count * shard.numel * shard.element_bytes
        for shard, count in shards
        if shard.numel <= _STAGE3_PERSISTENCE_THRESHOLD
    )
    largest = max(shard.numel for shard, _ in shards)
    whole = sum(count * shard.numel for shard, count in shards)
    gathered = min(whole, max(_STAGE3_MAX_LIVE_PARAMETERS, largest)) * _activation_bytes(layout.precision)
    return {
        "weights": weights + persistent,
        "gradients": _FP32_BYTES * partitions,
        "optimizer": ADAM_STATE_BYTES * partitions,
        "zero_buffers": REDUCE_BUCKET_NUMEL * _FP32_BYTES + gradient_in_flight + gathered,
    }


def _shard(kinds: Iterable[ParameterKind], layout: Layout) -> _Shard:
    """Parameters that are alike but for their size, as one."""
    members = list(kinds)
    numel, first = sum(kind.numel for kind in members), members[0]
    element_bytes = _FP32_BYTES if first.fp32 else _activation_bytes(layout.precision)
    if not first.num_experts:
        return _Shard(numel, layout.world_size, element_bytes)
    topology = Topology(layout.world_size, expert_parallel_size=layout.expert_parallel_size)
    local = numel // first.num_experts * len(topology.local_experts(first.num_experts))
    return _Shard(local, topology.expert_data_parallel_size, element_bytes)


def _flat_groups(kinds: Counter[ParameterKind], layout: Layout) -> list[_Shard]:
    """Optimizer groups: parameters of one dtype and decay, dense or experts, each flattened into one buffer."""
    members: dict[tuple[bool, bool, bool], list[ParameterKind]] = defaultdict(list)
    for kind in kinds.elements():
        members[kind.fp32 and layout.precision == "bf16", kind.num_experts > 0, kind.decays].append(kind)
    return [_shard(group, layout) for group in members.values()]
