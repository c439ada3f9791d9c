"""What a micro-batch keeps between forward and backward on one GPU, in bytes, with and without recomputation.

:func:`saved_tensors` lists what autograd keeps of each kind of layer, and what could be rebuilt in the backward pass
instead; :func:`activation_bytes` adds it up. With recomputation the tensors of one layer exist again while its backward
pass runs: the part ``rebuilt_layer``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from qwen3next_train.accounting.flops import count_mixers, gdn_dims, query_dim
from qwen3next_train.accounting.hardware import Precision
from qwen3next_train.accounting.layout import FP32_BYTES, Layout, bytes_of
from qwen3next_train.config.schema import ModelConfig

IMBALANCE_ALLOWANCE = 0.2
"""Rows above the mean that an expert-parallel rank is expected to receive, as a fraction."""

LayerKind = Literal["gdn", "attention", "moe", "other"]
CheapPart = Literal["norms", "activations", "conv_and_gates"]
"""Work without large matrix products, whose results are cheaper to compute again than to keep."""
Recompute = Literal["none", "selective", "full"]
"""``selective`` rebuilds every :data:`CheapPart`, ``full`` keeps nothing of a layer but its input."""
RECOMPUTE_MODES: tuple[Recompute, ...] = get_args(Recompute)

_GDN_CHUNK = 64
_CHUNK_LOGITS = 2**30  # what the linear_cross_entropy kernel holds at once on CUDA


@dataclass(frozen=True)
class SavedTensor:
    """Something autograd keeps from the forward pass until the backward pass.

    Args:
        name: what it is.
        bytes_per_token: bytes per token that enters the layer.
        bytes_per_layer: bytes that do not depend on the number of tokens.
        routed: its rows are routed copies of tokens, so that it grows with expert imbalance.
        part: the work that could be done again instead of keeping it; None where selective recomputation keeps it.
        source_bytes: bytes per token of what it is rebuilt from, kept in its place.
    """

    name: str
    bytes_per_token: int
    bytes_per_layer: int = 0
    routed: bool = False
    part: CheapPart | None = None
    source_bytes: int = 0

    def size(self, num_tokens: int) -> int:
        """Bytes of one layer for a micro-batch of ``num_tokens``."""
        return self.bytes_per_layer + self.bytes_per_token * num_tokens

    def kept(self, num_tokens: int, recompute: Recompute) -> int:
        """Bytes of one layer that stay until the backward pass; of ``full``, the layer's input is counted apart."""
        if recompute == "full":
            return 0
        if recompute == "selective" and self.part is not None:
            return self.source_bytes * num_tokens
        return self.size(num_tokens)


def activation_bytes(model: ModelConfig, layout: Layout, recompute: Recompute = "none") -> dict[str, int]:
    """Bytes of one micro-batch between forward and backward.

    Args:
        model: shape of the model.
        layout: precision, micro-batch and expert parallelism.
        recompute: what is computed again in the backward pass.

    Returns:
        By part: ``activations_<kind>`` of all layers of a kind, ``logits``, ``all_to_all``, ``imbalance``, and with
        recomputation ``rebuilt_layer``.
    """
    tokens, num_layers = layout.num_tokens, _num_layers(model)
    saved = saved_tensors(model, layout.precision)
    # The final norm and what joins the MTP depths are in no layer.
    modes: dict[LayerKind, Recompute] = dict.fromkeys(saved, recompute)
    modes["other"] = "none" if recompute == "full" else recompute
    by_kind = {
        kind: num_layers[kind] * sum(tensor.kept(tokens, modes[kind]) for tensor in tensors)
        for kind, tensors in saved.items()
    }
    if recompute == "full":
        for kind in ("gdn", "attention"):
            by_kind[kind] = num_layers[kind] * tokens * model.hidden_size * layout.element_bytes
    rebuilt = _rebuilt_layer(saved, num_layers, tokens, recompute)
    routed = [tensor for tensor in saved["moe"] if tensor.routed]
    # Under ``full`` one layer's rows exist at a time, rebuilt; else those that every layer keeps.
    layers_with_rows = 1 if recompute == "full" else num_layers["moe"]
    row_mode: Recompute = "none" if recompute == "full" else recompute
    exchange = _all_to_all(model, layout)
    uneven = layers_with_rows * sum(tensor.kept(tokens, row_mode) for tensor in routed) + exchange
    return {
        **{f"activations_{kind}": size for kind, size in by_kind.items()},
        **({} if recompute == "none" else {"rebuilt_layer": rebuilt}),
        "logits": _logits(model, layout),
        "all_to_all": exchange,
        "imbalance": int(IMBALANCE_ALLOWANCE * uneven) if layout.expert_parallel_size > 1 else 0,
    }


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
    saved: dict[LayerKind, tuple[SavedTensor, ...]], num_layers: dict[LayerKind, int], tokens: int, recompute: Recompute
) -> int:
    """Bytes that exist again while the largest layer's backward pass runs: mixer and experts under ``full``."""

    def rebuilt(tensors: Iterable[SavedTensor]) -> int:
        return sum(tensor.size(tokens) - tensor.kept(tokens, recompute) for tensor in tensors)

    mixer = max(rebuilt(saved[kind]) for kind in ("gdn", "attention") if num_layers[kind])
    experts = rebuilt(saved["moe"])
    return mixer + experts if recompute == "full" else max(mixer, experts)


def saved_tensors(model: ModelConfig, precision: Precision) -> dict[LayerKind, tuple[SavedTensor, ...]]:
    """What autograd keeps of each kind of layer when nothing is recomputed.

    Kernels (delta rule, convolution, attention, grouped products) keep their inputs; norms compute in fp32 from
    plain operations and keep their input and their normalised value.
    """
    element_bytes = bytes_of(precision)
    return {
        "gdn": _saved_gdn(model, element_bytes),
        "attention": _saved_attention(model, element_bytes),
        "moe": _saved_moe(model, element_bytes),
        "other": _saved_other(model, element_bytes),
    }


def _norm(name: str, width: int, element_bytes: int) -> tuple[SavedTensor, ...]:
    source = element_bytes * width
    return (
        SavedTensor(f"{name} input and normalised, fp32", 2 * FP32_BYTES * width, part="norms", source_bytes=source),
        SavedTensor(f"{name} output", element_bytes * width, part="norms"),
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
        SavedTensor("query, key, value", element_bytes * channels, part="conv_and_gates"),
        SavedTensor("normalised query, key", element_bytes * 2 * key_dim, part="conv_and_gates"),
        SavedTensor(
            "decay and write strength, fp32",
            2 * FP32_BYTES * heads,
            part="conv_and_gates",
            source_bytes=element_bytes * 2 * heads,
        ),
        SavedTensor("chunk matrix of the delta rule", element_bytes * heads * _GDN_CHUNK),
        SavedTensor(
            "gated norm: input, normalised, weighted, gate, silu, fp32",
            5 * FP32_BYTES * value_dim,
            part="norms",
            source_bytes=element_bytes * 2 * value_dim,
        ),
        SavedTensor("output projection input", element_bytes * value_dim, part="norms"),
    )


def _saved_attention(model: ModelConfig, element_bytes: int) -> tuple[SavedTensor, ...]:
    queries, keys = query_dim(model), model.num_key_value_heads * model.head_dim
    # Without a cast the query norm keeps its input, a view that holds the gate's half of the projection too.
    held = element_bytes * queries if element_bytes == FP32_BYTES else 0
    source = element_bytes * queries
    gate = (
        SavedTensor("sigmoid of the gate", source, part="activations", source_bytes=source),
        SavedTensor("gate", held, part="activations"),
        SavedTensor("output projection input", source, part="activations"),
    )
    return (
        *_norm("input_layernorm", model.hidden_size, element_bytes),
        SavedTensor(
            "q/k norm input and normalised, fp32",
            2 * FP32_BYTES * (queries + keys),
            part="norms",
            source_bytes=element_bytes * (queries + keys),
        ),
        SavedTensor("query, key", element_bytes * (queries + keys), part="norms"),
        SavedTensor("value", element_bytes * keys),
        SavedTensor("attention output", element_bytes * queries),
        SavedTensor("log-sum-exp, fp32", FP32_BYTES * model.num_attention_heads),
        *(gate if model.attention_output_gate else ()),
    )


def _saved_moe(model: ModelConfig, element_bytes: int) -> tuple[SavedTensor, ...]:
    hidden, ffn = model.hidden_size, model.moe_intermediate_size
    top_k, shared = model.num_experts_per_tok, model.shared_expert_intermediate_size
    pair = element_bytes * 2
    shared_tensors = (
        SavedTensor("shared gate, up", pair * shared),
        SavedTensor("shared silu and product", pair * shared, part="activations"),
        SavedTensor("shared expert output", element_bytes * hidden),
    )
    # The router's fp32 input is a copy only where the activations are not fp32 already.
    router_input = FP32_BYTES * hidden if element_bytes != FP32_BYTES else 0
    router_outputs = 2 if model.router_z_loss_coef else 1
    return (
        *_norm("post_attention_layernorm", hidden, element_bytes),
        SavedTensor("router input, fp32", router_input, part="norms"),
        SavedTensor(
            "router probabilities and, for the z-loss, logits, fp32", router_outputs * FP32_BYTES * model.num_experts
        ),
        SavedTensor("chosen experts, their weights and rows", 32 * top_k),
        SavedTensor("expert rows in and out", pair * hidden * top_k, routed=True),
        SavedTensor("expert gate, up", pair * ffn * top_k, routed=True),
        SavedTensor("expert silu and product", pair * ffn * top_k, routed=True, part="activations"),
        *(shared_tensors if shared else ()),
    )


def _saved_other(model: ModelConfig, element_bytes: int) -> tuple[SavedTensor, ...]:
    final = _norm("norm", model.hidden_size, element_bytes)
    depth = (
        SavedTensor(
            "mtp norms, fp32",
            6 * FP32_BYTES * model.hidden_size,
            part="norms",
            source_bytes=3 * element_bytes * model.hidden_size,
        ),
        SavedTensor("mtp fc input and norm output", 3 * element_bytes * model.hidden_size, part="norms"),
    )
    return final + depth * model.mtp_num_layers


def _logits(model: ModelConfig, layout: Layout) -> int:
    """Head and loss of the last depth, when the other depths' gradients already wait for the backward pass.

    A chunk holds fp32 logits and their log-softmax. Each use of the head leaves a weight gradient and a gradient of
    its input in the activations' dtype; the one under way sums its weight gradient in fp32.
    """
    tokens = min(layout.num_tokens, max(_CHUNK_LOGITS // model.vocab_size, 1))
    chunk = tokens * model.vocab_size * 2 * FP32_BYTES
    weight = model.vocab_size * model.hidden_size
    waiting = layout.element_bytes * (weight + layout.num_tokens * model.hidden_size)
    return chunk + weight * (FP32_BYTES + layout.element_bytes) + waiting * model.mtp_num_layers


def _all_to_all(model: ModelConfig, layout: Layout) -> int:
    """Send and receive buffer of one layer's dispatch, one copy of a token per chosen expert."""
    if layout.expert_parallel_size == 1:
        return 0
    row = model.hidden_size * layout.element_bytes
    return 2 * layout.num_tokens * model.num_experts_per_tok * row
