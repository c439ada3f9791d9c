"""The list of saved tensors against what autograd keeps of the built layers."""

from __future__ import annotations

from collections.abc import Callable, Collection
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from qwen3next_train.accounting.activations import kept_tensors, saved_tensors
from qwen3next_train.accounting.hardware import Precision
from qwen3next_train.batch import BatchSlices
from qwen3next_train.config.schema import ModelConfig, RecomputePart
from qwen3next_train.kernels.gdn_prologue import GdnPrologueOutputs, HeadShape
from qwen3next_train.kernels.routing import Routing, TokenPermutation
from qwen3next_train.model.gated_attention import GatedAttention
from qwen3next_train.model.gated_delta_net import GatedDeltaNet
from qwen3next_train.model.head_group import mixed_by_heads
from qwen3next_train.model.moe import SparseMoeBlock
from qwen3next_train.model.norms import RmsNormWithResidual
from qwen3next_train.model.recompute import recomputing
from qwen3next_train.model.rope import RotaryTable
from qwen3next_train.model.sequence_group import SlicedSequences
from qwen3next_train.row_slices import RowSlice, plan_slices
from tests.unit.model.live_storages import LiveStorages

MODEL = ModelConfig(
    vocab_size=64,
    hidden_size=512,
    num_hidden_layers=2,
    num_attention_heads=16,
    num_key_value_heads=2,
    head_dim=128,
    linear_key_head_dim=64,
    linear_value_head_dim=128,
    linear_num_key_heads=4,
    linear_num_value_heads=8,
    full_attention_interval=2,
    layer_types=["linear_attention", "full_attention"],
    num_experts=16,
    num_experts_per_tok=4,
    moe_intermediate_size=64,
    shared_expert_intermediate_size=96,
)


class _Kept(torch.autograd.Function):
    """A kernel that keeps the tensors it is given and returns something of others' shapes."""

    @staticmethod
    def forward(ctx: Any, likes: tuple[torch.Tensor, ...], *kept: torch.Tensor) -> Any:
        ctx.save_for_backward(*kept)
        results = tuple(torch.zeros(like.shape, dtype=like.dtype) for like in likes)
        return results[0] if len(results) == 1 else results

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> None:
        raise NotImplementedError


class _KeptWithResult(_Kept):
    """A kernel that keeps its result too."""

    @staticmethod
    def forward(ctx: Any, likes: tuple[torch.Tensor, ...], *kept: torch.Tensor) -> Any:
        result = _Kept.forward(ctx, likes, *kept)
        ctx.save_for_backward(*kept, result)
        return result


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _gdn_prologue(
    qkvz: torch.Tensor, ba: torch.Tensor, weight: torch.Tensor, *gates: torch.Tensor, heads: HeadShape, sequences: Any
) -> GdnPrologueOutputs:
    tokens, keys = qkvz.shape[0], (heads.key_heads, heads.key_dim)
    grouped = qkvz.view(tokens, heads.key_heads, -1)
    z = grouped[..., -heads.group * heads.value_dim :].unflatten(-1, (heads.group, heads.value_dim))
    q, k, v, g, beta = _Kept.apply(
        (
            _meta(tokens, *keys, dtype=qkvz.dtype),
            _meta(tokens, *keys, dtype=qkvz.dtype),
            _meta(tokens, heads.value_heads, heads.value_dim, dtype=qkvz.dtype),
            _meta(tokens, heads.value_heads, dtype=torch.float32),
            _meta(tokens, heads.value_heads, dtype=qkvz.dtype),
        ),
        *(qkvz, ba, weight, *gates),
    )
    return GdnPrologueOutputs(q, k, v, z, g, beta)


def _rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    initial_state_DNKV: torch.Tensor | None = None,
    **gates: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As FLA: its inputs, the cumulated decay instead of the decay, one matrix a chunk."""
    chunk = q.new_zeros(q.shape[0], v.shape[1], 64)
    kept = (q, k, v, gates["g_TN"].clone(), gates["beta_TN"], chunk)
    if initial_state_DNKV is None:
        return _Kept.apply((v,), *kept), None
    out, final_DNKV = _Kept.apply((v, initial_state_DNKV), *kept, initial_state_DNKV)
    return out, final_DNKV


def _summary(k: torch.Tensor, v: torch.Tensor, *, sequences: Any, **gates: Any) -> torch.Tensor:
    return v.new_zeros(sequences.num_documents, v.shape[1], k.shape[2], v.shape[2] + k.shape[2], dtype=torch.float32)


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, sequences: Any) -> torch.Tensor:
    """As flash attention: its inputs, its output (which the layer keeps as well) and the log-sum-exp."""
    return _KeptWithResult.apply((q,), q, k, v, torch.zeros(q.shape[:2]))


class _RmsNorm:
    """Each keeps what is normalised."""

    def normalize(self, x: torch.Tensor, weight_D: torch.Tensor, *, eps: float) -> torch.Tensor:
        return _Kept.apply((x,), x, weight_D)

    def rms_norm_with_residual(
        self, x_TD: torch.Tensor, weight_D: torch.Tensor, *, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return x_TD.view_as(x_TD), self.normalize(x_TD, weight_D, eps=eps)

    def fused_add_rms_norm(
        self, x_TD: torch.Tensor, y_TD: torch.Tensor, weight_D: torch.Tensor, *, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sum_TD = x_TD + y_TD
        return sum_TD, self.normalize(sum_TD, weight_D, eps=eps)


def _routing(x: torch.Tensor, weight: torch.Tensor, *, top_k: int, **options: Any) -> Routing:
    """As the Triton kernel: its inputs, the logits, what it chose and a weight for each."""
    logits = x.detach().float() @ weight.detach().T
    chosen = logits.topk(top_k).indices
    weights, mean_prob = _Kept.apply(
        (_meta(*chosen.shape, dtype=torch.float32), _meta(1, weight.shape[0], dtype=torch.float32)),
        *(x, weight, logits, chosen, torch.zeros(chosen.shape)),
    )
    counts = torch.ones(1, weight.shape[0], dtype=torch.int64)
    return Routing(weights, chosen, mean_prob, counts, torch.zeros(()), torch.zeros(()))


KERNELS: Any = SimpleNamespace(
    gdn_prologue=_gdn_prologue,
    gated_delta_rule=_rule,
    delta_rule_summary=_summary,
    delta_state_gradient=None,
    rms_norm=_RmsNorm(),
    qk_norm_rope=lambda x, weight, *angles, eps: _Kept.apply((x,), x, weight),
    gated_rms_norm=lambda x, gate, weight, *, eps: _Kept.apply((gate,), x, gate, weight),
    varlen_attention=_attention,
    output_gate=lambda x, gate: _Kept.apply((x,), x, gate),
    top_k_routing=_routing,
    token_permutation=TokenPermutation(),
    grouped_matmul=lambda x, weight, *, counts_e: _Kept.apply(
        (_meta(x.shape[0], weight.shape[1], dtype=x.dtype),), x, weight
    ),
    swiglu=lambda gate_up, *weights: _Kept.apply((gate_up.chunk(2, dim=-1)[0],), gate_up, *weights),
    shared_input=lambda x, count: tuple(x.view_as(x) for _ in range(count)),
    shared_expert_combine=lambda residual, base, branch, x, weight: (
        residual + (base + _Kept.apply((base,), branch, x, weight))
    ),
)


def _model(kind: str) -> ModelConfig:
    return MODEL.model_copy(update={"attention_output_gate": kind != "ungated attention"})


def _build(
    kind: str, slices: SlicedSequences | None = None, group: _OtherHeads | None = None
) -> tuple[nn.Module, Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]]:
    """A layer, and how to add to a residual stream what it makes of the stream's norm."""
    shares = 1 if group is None else group.size

    def add(layer: nn.Module, x: torch.Tensor, normed: torch.Tensor, *of_tokens: object) -> torch.Tensor:
        def mixer(x_UD: torch.Tensor) -> torch.Tensor:
            mixed_UD: torch.Tensor = layer(x_UD, None, *of_tokens, slices)
            return mixed_UD

        return x + (mixer(normed) if group is None else mixed_by_heads(mixer, normed, group=group, num_rows=1))

    if kind == "gdn":
        return GatedDeltaNet(MODEL, KERNELS, shares), add
    if kind.endswith("attention"):
        # Angles belong to the micro-batch, not to the layer.
        table = RotaryTable(*torch.zeros(2, 1, 1, 32, device="cpu"))
        return GatedAttention(_model(kind), KERNELS, shares), lambda *layer_and_streams: add(*layer_and_streams, table)
    return SparseMoeBlock(MODEL, KERNELS, range(16)), lambda layer, x, normed: layer(normed, 1, residual_TD=x)[0]


def _bytes_kept(
    kind: str,
    dtype: torch.dtype,
    num_tokens: int,
    recompute: Collection[RecomputePart],
    slices: SlicedSequences | None = None,
    group: _OtherHeads | None = None,
) -> int:
    """Bytes, parameters left out, that norm and layer keep alive for the backward pass."""
    # To draw weights would take most of the time, and what is kept does not depend on them.
    with torch.device("meta"):
        layer, call = _build(kind, slices, group)
        norm = RmsNormWithResidual(MODEL.hidden_size, 1e-6, KERNELS.rms_norm)
    for module in (layer.to_empty(device="cpu"), norm.to_empty(device="cpu")):
        for name, parameter in module.named_parameters():
            fp32 = name in ("A_log", "dt_bias", "gate.weight")
            parameter.data = torch.full_like(parameter, 0.5, dtype=torch.float32 if fp32 else dtype)
    start = torch.ones(num_tokens, MODEL.hidden_size, dtype=dtype, requires_grad=True)
    with LiveStorages() as storages, recomputing(recompute):
        out = call(layer, *norm(start * 1))
        assert out.requires_grad
        return storages.live_bytes(without=[out, *layer.parameters(), *norm.parameters()])


SUBSETS: tuple[tuple[RecomputePart, ...], ...] = (
    *((), ("norms",), ("activations",), ("gdn_prologue",), ("norms", "activations"), ("norms", "gdn_prologue")),
    *(("activations", "gdn_prologue"), ("norms", "activations", "gdn_prologue")),
)


class _NoOthers:
    """A group whose other ranks send what is sent to them."""

    rank, size = 1, 4

    def exchange(self, parts_PX: torch.Tensor) -> torch.Tensor:
        return parts_PX * 1

    def from_previous(self, rows_X: torch.Tensor) -> torch.Tensor:
        return rows_X * 1

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        return values.unsqueeze(0).repeat(self.size, *(1 for _ in values.shape))


class _OtherHeads:
    """Ranks whose tokens and terms are this one's."""

    rank = 1

    def __init__(self, size: int) -> None:
        self.size = size

    def gather(self, x_TD: torch.Tensor) -> torch.Tensor:
        return x_TD.repeat(self.size, 1)

    def add_up(self, y_UD: torch.Tensor) -> torch.Tensor:
        return y_UD.unflatten(0, (self.size, -1)).sum(0)


def _slices(num_tokens: int) -> SlicedSequences:
    """The second of four slices of one document."""
    group = _NoOthers()
    part = RowSlice(group.rank, group.size, halo=MODEL.linear_conv_kernel_dim - 1)
    plan = plan_slices(np.array([0, num_tokens * group.size]), num_rows=1, part=part)
    return SlicedSequences.of(BatchSlices.of(plan), group)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("kind", ["gdn", "attention", "ungated attention"])
@pytest.mark.parametrize("recompute", SUBSETS, ids=lambda parts: "+".join(parts) or "none")
def test_saved_bytes_per_token_of_slices(kind: str, precision: Precision, recompute: tuple[RecomputePart, ...]) -> None:
    """To the byte; four ranks repeat the two key and value heads. A halo of three tokens comes on top."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    few, many = (_bytes_kept(kind, dtype, tokens, recompute, _slices(tokens)) for tokens in (64, 192))
    saved = saved_tensors(_model(kind), precision, context_parallel_size=4)
    kept = kept_tensors(saved[kind.removeprefix("ungated ")], recompute)  # type: ignore[index]
    per_token = sum(tensor.bytes_per_token for tensor in kept)
    assert 128 * per_token == many - few
    assert 0 <= few - sum(tensor.size(64) for tensor in kept) < 4 * per_token


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("slices", [False, True])
@pytest.mark.parametrize("kind", ["gdn", "attention", "ungated attention"])
@pytest.mark.parametrize("recompute", [SUBSETS[0], SUBSETS[-1]], ids=lambda parts: "+".join(parts) or "none")
def test_saved_bytes_per_token_of_divided_heads(
    size: int, slices: bool, kind: str, recompute: tuple[RecomputePart, ...]
) -> None:
    """To the byte of a rank's own tokens; of four ranks two have the same key and value heads."""
    cut = (lambda tokens: _slices(size * tokens)) if slices else (lambda tokens: None)
    group = _OtherHeads(size)
    few, many = (_bytes_kept(kind, torch.bfloat16, tokens, recompute, cut(tokens), group) for tokens in (64, 192))
    sizes = {"context_parallel_size": 4 if slices else 1, "tensor_parallel_size": size}
    saved = saved_tensors(_model(kind), "bf16", **sizes)
    kept = kept_tensors(saved[kind.removeprefix("ungated ")], recompute)  # type: ignore[index]
    assert 128 * sum(tensor.bytes_per_token for tensor in kept) == many - few


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("kind", ["gdn", "attention", "ungated attention", "moe"])
@pytest.mark.parametrize("recompute", SUBSETS, ids=lambda parts: "+".join(parts) or "none")
def test_saved_bytes_per_token(kind: str, precision: Precision, recompute: tuple[RecomputePart, ...]) -> None:
    """To the byte, with any recompute: what depends on the number of tokens and what does not."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    few, many = (_bytes_kept(kind, dtype, tokens, recompute) for tokens in (64, 192))
    tensors = saved_tensors(_model(kind), precision)[kind.removeprefix("ungated ")]  # type: ignore[index]
    kept = kept_tensors(tensors, recompute)
    assert 128 * sum(tensor.bytes_per_token for tensor in kept) == many - few
    # A sort that is kept to copy tokens again brings its 16 counts along.
    assert 0 <= few - sum(tensor.size(64) for tensor in kept) < 200
