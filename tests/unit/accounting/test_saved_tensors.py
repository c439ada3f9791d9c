"""The list of saved tensors against what autograd keeps of the built layers."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from qwen3next_train.accounting.activations import saved_tensors
from qwen3next_train.accounting.hardware import Precision
from qwen3next_train.config.schema import ModelConfig
from qwen3next_train.kernels.gated_rms_norm.reference import gated_rms_norm_reference
from qwen3next_train.kernels.token_permutation.reference import TokenPermutationReference
from qwen3next_train.model.gated_attention import GatedAttention
from qwen3next_train.model.gated_delta_net import GatedDeltaNet
from qwen3next_train.model.moe import SparseMoeBlock
from qwen3next_train.model.norms import ZeroCenteredRmsNorm
from qwen3next_train.model.rope import rotary_table

MODEL = ModelConfig(
    vocab_size=64,
    hidden_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=128,
    linear_key_head_dim=64,
    linear_value_head_dim=128,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    full_attention_interval=2,
    layer_types=["linear_attention", "full_attention"],
    num_experts=16,
    num_experts_per_tok=4,
    moe_intermediate_size=64,
    shared_expert_intermediate_size=96,
)


class _Kept(torch.autograd.Function):
    """A kernel that keeps the tensors it is given and returns something of another's shape."""

    @staticmethod
    def forward(ctx: Any, like: torch.Tensor, *kept: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*kept)
        return torch.zeros_like(like)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> None:
        raise NotImplementedError


def _rule(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **gates: Any) -> tuple[torch.Tensor, None]:
    """As FLA: normalised copies of q and k, v, cumulated decay, write strength, one matrix a chunk."""
    chunk = q.new_zeros(q.shape[0], v.shape[1], 64)
    return _Kept.apply(v, q.clone(), k.clone(), v, gates["g_TN"].clone(), gates["beta_TN"], chunk), None


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, sequences: Any) -> torch.Tensor:
    """As flash attention: its inputs, its output (kept by the gate's product) and the log-sum-exp."""
    return _Kept.apply(q, q, k, v, torch.zeros(q.shape[:2]))


def _grouped(x: torch.Tensor, weight: torch.Tensor, *, counts_e: torch.Tensor) -> torch.Tensor:
    return _Kept.apply(x.new_zeros(x.shape[0], weight.shape[1]), x, weight)


KERNELS: Any = SimpleNamespace(
    gated_delta_rule=_rule,
    causal_conv1d=lambda x, weight, *, sequences: _Kept.apply(x, x, weight),
    token_permutation=TokenPermutationReference(),
    gated_rms_norm=gated_rms_norm_reference,
    varlen_attention=_attention,
    grouped_matmul=_grouped,
)


def _model(kind: str) -> ModelConfig:
    return MODEL.model_copy(update={"attention_output_gate": kind != "ungated attention"})


def _build(kind: str) -> tuple[nn.Module, Callable[[nn.Module, torch.Tensor], torch.Tensor]]:
    if kind == "gdn":
        return GatedDeltaNet(MODEL, KERNELS), lambda layer, x: layer(x, None)
    if kind.endswith("attention"):

        def attend(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
            table = rotary_table(torch.arange(x.shape[0]), head_dim=128, fraction=0.25, theta=1e7)
            return layer(x, None, table)

        return GatedAttention(_model(kind), KERNELS), attend
    return SparseMoeBlock(MODEL, KERNELS, range(16)), lambda layer, x: layer(x, 1)[0]


def _bytes_kept(kind: str, dtype: torch.dtype, num_tokens: int) -> int:
    """Bytes of distinct storages, parameters left out, that autograd holds of norm and layer."""
    layer, call = _build(kind)
    norm = ZeroCenteredRmsNorm(MODEL.hidden_size, 1e-6)
    for module in (layer, norm):
        for name, parameter in module.named_parameters():
            fp32 = name in ("A_log", "dt_bias", "gate.weight")
            parameter.data = torch.rand_like(parameter).to(torch.float32 if fp32 else dtype)
    own = {p.untyped_storage().data_ptr() for module in (layer, norm) for p in module.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = torch.randn(num_tokens, MODEL.hidden_size, dtype=dtype, requires_grad=True) * 1
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = x + call(layer, norm(x))
    assert out.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("kind", ["gdn", "attention", "ungated attention", "moe"])
def test_saved_bytes_per_token(kind: str, precision: Precision) -> None:
    """Within 3 %: reciprocal roots, rotary angles and other per-row scalars are not listed."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    few, many = (_bytes_kept(kind, dtype, tokens) for tokens in (64, 192))
    measured = (many - few) / 128
    tensors = saved_tensors(_model(kind), precision)[kind.removeprefix("ungated ")]  # type: ignore[index]
    listed = sum(tensor.bytes_per_token for tensor in tensors)
    assert listed == pytest.approx(measured, rel=0.03)
