"""What a micro-batch keeps between forward and backward on one GPU, in bytes, with and without recompute.

:func:`saved_tensors` lists what autograd keeps of each kind of layer, to what part of ``parallel.recompute`` it
belongs and from what it is recomputed; :func:`activation_bytes` adds it up. With recompute the tensors of one layer
exist again while its backward pass runs: the part ``rebuilt_layer``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from qwen3next_train.accounting.flops import count_mixers, gdn_dims, query_dim
from qwen3next_train.accounting.hardware import Precision
from qwen3next_train.accounting.layout import FP32_BYTES, Layout, bytes_of
from qwen3next_train.config.schema import ModelConfig, RecomputePart

IMBALANCE_ALLOWANCE = 0.2
"""Rows above the mean that an expert-parallel rank is expected to receive, as a fraction."""
ROOM_FACTOR = 1.25
"""Room for rows of a rank's experts over their expected number, where it has to be known before the routing is."""

_SPARE_ROWS = 1024  # a few hundred rows spread by more than a quarter

LayerKind = Literal["gdn", "attention", "moe", "other"]

_GDN_CHUNK = 64
_CHUNK_LOGITS = 5 * 2**28  # of kernels.triton.linear_cross_entropy, which cannot be imported without Triton


@dataclass(frozen=True)
class SavedTensor:
    """Something autograd keeps from the forward pass until the backward pass.

    Args:
        name: what it is.
        bytes_per_token: bytes per token that enters the layer.
        bytes_per_layer: bytes that do not depend on the number of tokens.
        routed: its rows are routed copies of tokens, so that it grows with expert imbalance.
        part: the recompute that computes it again instead of keeping it; None where only ``layer`` does.
        sources: names of the tensors of the same kind of layer that it is computed again from.
        only_as_source: nobody keeps it but to compute others again.
    """

    name: str
    bytes_per_token: int
    bytes_per_layer: int = 0
    routed: bool = False
    part: RecomputePart | None = None
    sources: tuple[str, ...] = ()
    only_as_source: bool = False

    def size(self, num_tokens: int) -> int:
        """Bytes of one layer for a micro-batch of ``num_tokens``."""
        return self.bytes_per_layer + self.bytes_per_token * num_tokens


def kept_tensors(tensors: Iterable[SavedTensor], recompute: Collection[RecomputePart]) -> tuple[SavedTensor, ...]:
    """What of one layer stays until the backward pass when parts of it are recomputed, ``layer`` not considered.

    Args:
        tensors: all of one kind of layer.
        recompute: parts; what they recompute goes, what they recompute it from stays.
    """
    by_name = {tensor.name: tensor for tensor in tensors}

    def roots(tensor: SavedTensor) -> set[str]:
        if tensor.part not in recompute:
            return {tensor.name}
        return {root for source in tensor.sources for root in roots(by_name[source])}

    names = {root for tensor in by_name.values() if not tensor.only_as_source for root in roots(tensor)}
    return tuple(tensor for tensor in by_name.values() if tensor.name in names)


def activation_bytes(model: ModelConfig, layout: Layout) -> dict[str, int]:
    """Bytes of the micro-batches in flight between forward and backward.

    Args:
        model: shape of the model.
        layout: precision, micro-batch, expert parallelism and recompute.

    Returns:
        By part: ``activations_<kind>`` of all layers of a kind, ``rebuilt_layer`` (0 without recompute), ``logits``,
        ``all_to_all``, ``imbalance``.
    """
    tokens, num_layers = layout.num_tokens * layout.micro_batches_in_flight, _num_layers(model)
    saved = saved_tensors(
        model,
        layout.precision,
        expert_parallel_size=layout.expert_parallel_size,
        exchanges_densely=layout.exchanges_densely,
        context_parallel_size=layout.context_parallel_size,
        tensor_parallel_size=layout.tensor_parallel_size,
        num_rows=layout.micro_batch_size,
    )
    whole_layers = "layer" in layout.recompute
    parts = set(layout.recompute) - {"layer"}
    kept = {kind: kept_tensors(tensors, parts) for kind, tensors in saved.items()}
    by_kind = {kind: num_layers[kind] * _size(tensors, tokens) for kind, tensors in kept.items()}
    if whole_layers:
        # Of a decoder layer its input; the final norm and what joins the MTP depths are in no layer.
        for kind in ("gdn", "attention"):
            by_kind[kind] = num_layers[kind] * tokens * model.hidden_size * layout.element_bytes
        by_kind["moe"] = 0
    rows = kept_tensors(saved["moe"], ()) if whole_layers else kept["moe"]
    # Of recomputed layers one layer's rows exist at a time, else those that every layer keeps.
    layers_with_rows = 1 if whole_layers else num_layers["moe"]
    routed = layers_with_rows * _size((tensor for tensor in rows if tensor.routed), tokens)
    exchange = _all_to_all(model, layout)
    # Parts are recomputed when one micro-batch's backward pass asks for them, whole layers for all of those in flight.
    rebuilt_tokens = tokens if whole_layers else layout.num_tokens
    return {
        **{f"activations_{kind}": size for kind, size in by_kind.items()},
        "rebuilt_layer": _rebuilt_layer(saved, kept, num_layers, rebuilt_tokens, whole=whole_layers),
        "logits": _logits(model, layout),
        # Never at the same time.
        "all_to_all": max(exchange, _context_exchange(model, layout), _tensor_exchange(model, layout)),
        "imbalance": _imbalance(model, layout, routed, exchange),
    }


def _imbalance(model: ModelConfig, layout: Layout, routed: int, exchange: int) -> int:
    """Bytes above the mean: of the dense exchange the room that there is, else what may be needed."""
    if layout.exchanges_densely:
        mean = expert_rows(model, layout)
        return routed * (expert_room(model, layout, mean) - mean) // mean
    return int(IMBALANCE_ALLOWANCE * (routed + exchange)) if layout.expert_parallel_size > 1 else 0


def expert_rows(model: ModelConfig, layout: Layout) -> int:
    """Rows of a rank's experts in one micro-batch and layer, on average."""
    return layout.num_tokens * model.num_experts_per_tok


def expert_room(model: ModelConfig, layout: Layout, num_rows: int) -> int:
    """Rows that a rank's experts get room for in the dense exchange when they are expected to get ``num_rows``.

    Never more than there can be: of every token of every rank as many as it chooses or the rank has.
    """
    size = layout.expert_parallel_size
    most = size * layout.num_tokens * min(model.num_experts_per_tok, model.num_experts // size)
    return min(int(ROOM_FACTOR * num_rows) + _SPARE_ROWS, most)


def _size(tensors: Iterable[SavedTensor], tokens: int) -> int:
    return sum(tensor.size(tokens) for tensor in tensors)


def _num_layers(model: ModelConfig) -> dict[LayerKind, int]:
    gdn_layers, attention_layers = count_mixers(model)
    depths = model.mtp_num_layers
    return {
        "gdn": gdn_layers,
        "attention": attention_layers + depths,
        "moe": model.num_hidden_layers + depths,
        "other": 1,
    }


def _rebuilt_layer(
    saved: dict[LayerKind, tuple[SavedTensor, ...]],
    kept: dict[LayerKind, tuple[SavedTensor, ...]],
    num_layers: dict[LayerKind, int],
    tokens: int,
    *,
    whole: bool,
) -> int:
    """Bytes that exist again while the largest layer's backward pass runs: of whole layers mixer and experts."""

    def recomputed(kind: LayerKind) -> int:
        there = set() if whole else {tensor.name for tensor in kept[kind]}
        return _size((t for t in saved[kind] if t.name not in there and not t.only_as_source), tokens)

    mixer = max(recomputed(kind) for kind in ("gdn", "attention") if num_layers[kind])
    return mixer + recomputed("moe") if whole else max(mixer, recomputed("moe"))


def saved_tensors(
    model: ModelConfig,
    precision: Precision,
    *,
    expert_parallel_size: int = 1,
    exchanges_densely: bool = False,
    context_parallel_size: int = 1,
    tensor_parallel_size: int = 1,
    num_rows: int = 1,
) -> dict[LayerKind, tuple[SavedTensor, ...]]:
    """What autograd keeps of each kind of layer when nothing is recomputed, and what it could be recomputed from.

    Every operation keeps its inputs, as the CUDA kernels do; delta rule and attention keep some results of their own.
    Of T ranks that divide the heads each has a T-th of them for T times its own tokens.
    """
    element_bytes = bytes_of(precision)
    kv_heads = kv_heads_exchanged(model, 1, tensor_parallel_size)
    mixers = {
        "gdn": _saved_gdn(model, element_bytes),
        "attention": _saved_attention(model, element_bytes, kv_heads),
    }
    if context_parallel_size > 1:
        exchanged = kv_heads_exchanged(model, context_parallel_size, tensor_parallel_size)
        mixers = {
            "gdn": (*mixers["gdn"], *_saved_to_pass_states(model, num_rows, tensor_parallel_size)),
            "attention": _saved_attention_by_heads(model, element_bytes, kv_heads, exchanged),
        }
    if tensor_parallel_size > 1:
        gathered = SavedTensor("gathered input", element_bytes * model.hidden_size * tensor_parallel_size)
        mixers = {
            kind: tuple(gathered if tensor.name == "input_layernorm output" else tensor for tensor in tensors)
            for kind, tensors in mixers.items()
        }
    return {
        "gdn": mixers["gdn"],
        "attention": mixers["attention"],
        "moe": _saved_moe(model, element_bytes, expert_parallel_size, exchanges_densely=exchanges_densely),
        "other": _saved_other(model, element_bytes),
    }


def _norm(name: str, width: int, element_bytes: int) -> tuple[SavedTensor, ...]:
    source = f"{name} input"
    return (
        SavedTensor(source, element_bytes * width),
        SavedTensor(f"{name} output", element_bytes * width, part="norms", sources=(source,)),
    )


def _saved_gdn(model: ModelConfig, element_bytes: int) -> tuple[SavedTensor, ...]:
    key_dim, value_dim = gdn_dims(model)
    heads = model.linear_num_value_heads
    channels = 2 * key_dim + value_dim
    large, small = "projected query, key, value, gate", "projected decay, write strength"
    output = "output of the delta rule"
    return (
        *_norm("input_layernorm", model.hidden_size, element_bytes),
        SavedTensor(large, element_bytes * (channels + value_dim)),
        SavedTensor(small, element_bytes * 2 * heads),
        SavedTensor("query, key, value", element_bytes * channels, part="gdn_prologue", sources=(large, small)),
        SavedTensor("write strength", element_bytes * heads, part="gdn_prologue", sources=(large, small)),
        SavedTensor("cumulated decay, fp32", FP32_BYTES * heads),
        SavedTensor("chunk matrix of the delta rule", element_bytes * heads * _GDN_CHUNK),
        SavedTensor(output, element_bytes * value_dim),
        SavedTensor("output projection input", element_bytes * value_dim, part="activations", sources=(output, large)),
    )


def _saved_attention(model: ModelConfig, element_bytes: int, kv_heads: int) -> tuple[SavedTensor, ...]:
    queries, keys = query_dim(model), kv_heads * model.head_dim
    large, small, output = "projected query, gate", "projected key", "attention output"
    # Query and gate are views of one tensor: whoever keeps one of them keeps both.
    has_gate = model.attention_output_gate
    gated = SavedTensor("gated output", element_bytes * queries, part="activations", sources=(output, large))
    return (
        *_norm("input_layernorm", model.hidden_size, element_bytes),
        SavedTensor(large, element_bytes * queries * (2 if has_gate else 1)),
        SavedTensor(small, element_bytes * keys),
        SavedTensor("query, key", element_bytes * (queries + keys), part="norms", sources=(large, small)),
        SavedTensor("value", element_bytes * keys),
        SavedTensor(output, element_bytes * queries),
        SavedTensor("log-sum-exp, fp32", FP32_BYTES * model.num_attention_heads),
        *((gated,) if has_gate else ()),
    )


def _saved_to_pass_states(model: ModelConfig, num_rows: int, tensor_parallel_size: int) -> tuple[SavedTensor, ...]:
    """The state that arrives at the slice of each row, what the slice makes of one, and decays besides their sums."""
    projected = tuple(tensor.name for tensor in _saved_gdn(model, FP32_BYTES) if tensor.name.startswith("projected"))
    decay = FP32_BYTES * model.linear_num_value_heads
    states = passed_state_bytes(model, num_rows, tensor_parallel_size)
    return (
        SavedTensor("arriving state, transition, fp32", 0, bytes_per_layer=states),
        SavedTensor("decay, fp32", decay, part="gdn_prologue", sources=projected),
    )


def passed_state_bytes(model: ModelConfig, num_rows: int, tensor_parallel_size: int) -> int:
    """Bytes of a state of a rank's heads of a Gated DeltaNet layer, and of what a slice makes of one, for each row."""
    key_dim, heads = model.linear_key_head_dim, model.linear_num_value_heads // tensor_parallel_size
    return FP32_BYTES * num_rows * heads * key_dim * (model.linear_value_head_dim + key_dim)


def _saved_attention_by_heads(
    model: ModelConfig, element_bytes: int, kv_heads: int, exchanged_kv_heads: int
) -> tuple[SavedTensor, ...]:
    """Some heads of all tokens: what has travelled is not recomputed, and the output is kept before and behind."""
    keys = element_bytes * exchanged_kv_heads * model.head_dim
    queries = element_bytes * query_dim(model)
    exchanged = {
        "query, key": SavedTensor("query, key", queries + keys),
        "value": SavedTensor("value", keys),
    }
    saved = (exchanged.get(tensor.name, tensor) for tensor in _saved_attention(model, element_bytes, kv_heads))
    return (*saved, SavedTensor("attention output of whole rows", queries))


def kv_heads_exchanged(model: ModelConfig, context_parallel_size: int, tensor_parallel_size: int) -> int:
    """Key heads, or value heads, that a token has on all ranks of its tensor group together when attention begins.

    Repeated where a rank has fewer than there are slices, each of which gets one at least.
    """
    of_rank = max(1, model.num_key_value_heads // tensor_parallel_size)
    return tensor_parallel_size * max(of_rank, context_parallel_size)


def _context_exchange(model: ModelConfig, layout: Layout) -> int:
    """Send and receive buffer of queries, keys and values, or of the states of all ranks."""
    size = layout.context_parallel_size
    if size == 1:
        return 0
    tensor = layout.tensor_parallel_size
    heads = model.num_attention_heads + 2 * kv_heads_exchanged(model, size, tensor)
    tokens = 2 * layout.num_tokens * heads * model.head_dim * layout.element_bytes
    states = (size + 1) * passed_state_bytes(model, layout.micro_batch_size, tensor)
    return max(tokens, states)


def _tensor_exchange(model: ModelConfig, layout: Layout) -> int:
    """Send and receive buffer of what a tensor group's ranks add to the outputs of all of its tokens."""
    size = layout.tensor_parallel_size
    return 2 * size * layout.num_tokens * model.hidden_size * layout.element_bytes if size > 1 else 0


def _saved_moe(
    model: ModelConfig, element_bytes: int, expert_parallel_size: int, *, exchanges_densely: bool
) -> tuple[SavedTensor, ...]:
    hidden, ffn = model.hidden_size, model.moe_intermediate_size
    top_k, shared = model.num_experts_per_tok, model.shared_expert_intermediate_size
    row = element_bytes * hidden
    norm = _norm("post_attention_layernorm", hidden, element_bytes)
    copied = norm[-1].name
    between_ranks: tuple[SavedTensor, ...] = ()
    if expert_parallel_size > 1:
        copied = "rows from other ranks"
        rows = round(row * _rows_sent(model, expert_parallel_size, exchanges_densely=exchanges_densely))
        between_ranks = (SavedTensor(copied, rows, routed=not exchanges_densely, only_as_source=True),)
    if exchanges_densely:
        # Where each rank finds the rows of all ranks' tokens.
        between_ranks += (SavedTensor("rows of other ranks' choices", 8 * top_k * (expert_parallel_size - 1)),)
    shared_tensors = (
        SavedTensor("shared gate, up", element_bytes * 2 * shared),
        SavedTensor("shared SwiGLU output", element_bytes * shared, part="activations", sources=("shared gate, up",)),
        SavedTensor("joined weights of shared gate, up", 0, bytes_per_layer=2 * shared * row),
        SavedTensor("shared expert output", row),
    )
    inner = element_bytes * ffn * top_k
    return (
        *norm,
        SavedTensor("router logits, fp32", FP32_BYTES * model.num_experts),
        # Two int64 and fp32 for the token's side, int64 and fp32 for the row's.
        SavedTensor("chosen experts, their weights and rows", 32 * top_k),
        *between_ranks,
        SavedTensor("expert rows in", row * top_k, routed=True, part="activations", sources=(copied,)),
        SavedTensor("expert gate, up", 2 * inner, routed=True),
        SavedTensor("expert SwiGLU output", inner, routed=True, part="activations", sources=("expert gate, up",)),
        *(shared_tensors if shared else ()),
    )


def ranks_per_token(model: ModelConfig, expert_parallel_size: int) -> float:
    """Ranks that hold an expert of a token, on average, when every choice of experts is as likely."""
    elsewhere = model.num_experts - model.num_experts // expert_parallel_size
    none = math.comb(elsewhere, model.num_experts_per_tok) / math.comb(model.num_experts, model.num_experts_per_tok)
    return expert_parallel_size * (1 - none)


def rows_sent_per_token(model: ModelConfig, layout: Layout) -> float:
    """Ranks that a token goes to, its own included."""
    return _rows_sent(model, layout.expert_parallel_size, exchanges_densely=layout.exchanges_densely)


def _rows_sent(model: ModelConfig, expert_parallel_size: int, *, exchanges_densely: bool) -> float:
    return expert_parallel_size if exchanges_densely else ranks_per_token(model, expert_parallel_size)


def _saved_other(model: ModelConfig, element_bytes: int) -> tuple[SavedTensor, ...]:
    """Of the final norm, and by depth of MTP's three norms and its projection."""
    tensors = _norm("norm", model.hidden_size, element_bytes)
    for depth in range(1, model.mtp_num_layers + 1):
        for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
            tensors += _norm(f"mtp {depth} {name}", model.hidden_size, element_bytes)
    return tensors


def _logits(model: ModelConfig, layout: Layout) -> int:
    """Head and loss of the last depth, when the other depths' gradients already wait for the backward pass.

    By the Triton kernel: a chunk's logits, in whose place their gradient is left. Each use of the head leaves a
    weight gradient in fp32 and a gradient of its input in the activations' dtype.
    """
    num_chunks = math.ceil(layout.num_tokens * model.vocab_size / _CHUNK_LOGITS)
    chunk = math.ceil(layout.num_tokens / num_chunks) * model.vocab_size * layout.element_bytes
    of_weight = FP32_BYTES * model.vocab_size * model.hidden_size
    of_input = layout.element_bytes * layout.num_tokens * model.hidden_size
    return chunk + layout.micro_batches_in_flight * (1 + model.mtp_num_layers) * (of_weight + of_input)


def _all_to_all(model: ModelConfig, layout: Layout) -> int:
    """Send and receive buffer of one layer's way back, one row of a token per rank that it goes to.

    Of each micro-batch in flight: the first's outputs travel while the second's are computed.
    """
    if layout.expert_parallel_size == 1:
        return 0
    row = model.hidden_size * layout.element_bytes
    tokens = layout.num_tokens * layout.micro_batches_in_flight
    return 2 * round(tokens * row * rows_sent_per_token(model, layout))
