"""The delta rule's inputs in one pass over the projection each way (Triton).

The convolution's input is read where the projection has left it, interleaved by key head; z stays there. Kept for the
backward pass are the projections alone: what lies between them and the outputs is computed again in registers.

Letters: T tokens, H key heads, N value heads, R = N / H, K key head dim, V value head dim, W convolution width,
C = 2HK + NV convolution channels, P = C + NV columns of the large projection, M = 2N columns of the small one, X any
columns, B blocks of tokens, S columns of the filter, padded to 4.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from qwen3next_train.errors import KernelUnavailable
from qwen3next_train.kernels.gdn_prologue import L2_NORM_EPS, GdnPrologueOutputs, HeadShape
from qwen3next_train.kernels.triton.convolution_kernels import convolve_backward_kernel, convolve_kernel
from qwen3next_train.kernels.triton.gate_kernels import gates_backward_kernel, gates_kernel, place_gate_kernel
from qwen3next_train.kernels.triton.row_programs import ceil_div, next_power_of_2
from qwen3next_train.kernels.varlen import VarlenMetadata

_TAPS = 4
"""Columns of the filter; a narrower one has zeros in front."""

_FORWARD_TOKENS = 16
_BACKWARD_TOKENS = 128
_FEW_TOKENS = 2048
"""Up to so many tokens shorter stretches keep more of the device busy in the backward pass."""
_GATE_TOKENS = 64
_PLACED_ELEMENTS = 4096
"""Elements of z's gradient that a program puts in their place."""


def gdn_prologue_triton(
    qkvz_TP: torch.Tensor,
    ba_TM: torch.Tensor,
    weight_CW: torch.Tensor,
    A_log_N: torch.Tensor,
    dt_bias_N: torch.Tensor,
    *,
    heads: HeadShape,
    sequences: VarlenMetadata,
) -> GdnPrologueOutputs:
    """Computed in fp32 and rounded once.

    Raises:
        KernelUnavailable: the filters are wider than 4.
    """
    if weight_CW.shape[1] > _TAPS:
        raise KernelUnavailable(
            f"kernels.fused: the fused convolution takes filters up to {_TAPS} wide and "
            f"model.linear_conv_kernel_dim is {weight_CW.shape[1]}; choose 'reference'"
        )
    outputs = _GdnPrologue.apply(qkvz_TP, ba_TM, weight_CW, A_log_N, dt_bias_N, sequences.starts(), heads)
    return GdnPrologueOutputs(*outputs)


class _GdnPrologue(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, qkvz_TP, ba_TM, weight_CW, A_log_N, dt_bias_N, starts_T, heads: HeadShape
    ) -> tuple[torch.Tensor, ...]:
        qkvz_TP, ba_TM, weight_CW = qkvz_TP.contiguous(), ba_TM.contiguous(), weight_CW.contiguous()
        num_tokens = qkvz_TP.shape[0]
        q_THK, k_THK = (qkvz_TP.new_empty(num_tokens, heads.key_heads, heads.key_dim) for _ in "qk")
        v_TNV = qkvz_TP.new_empty(num_tokens, heads.value_heads, heads.value_dim)
        for normed, outputs in ((True, (q_THK, k_THK)), (False, (v_TNV, v_TNV))):
            convolve_kernel[_grid(heads, normed, num_tokens, _FORWARD_TOKENS)](
                qkvz_TP,
                weight_CW,
                starts_T,
                *outputs,
                num_tokens,
                **_constants(heads, normed, weight_CW),
                BLOCK_T=_FORWARD_TOKENS,
                num_warps=4,
            )
        gate_dtype = torch.promote_types(qkvz_TP.dtype, torch.float32)
        g_TN = torch.empty(num_tokens, heads.value_heads, dtype=gate_dtype, device=qkvz_TP.device)
        beta_TN = qkvz_TP.new_empty(num_tokens, heads.value_heads)
        gates_kernel[(ceil_div(num_tokens, _GATE_TOKENS),)](
            ba_TM, A_log_N, dt_bias_N, g_TN, beta_TN, num_tokens, **_gate_constants(heads)
        )
        ctx.save_for_backward(qkvz_TP, ba_TM, weight_CW, A_log_N, dt_bias_N, starts_T)
        ctx.heads = heads
        return q_THK, k_THK, v_TNV, _gate_columns(qkvz_TP, heads), g_TN, beta_TN

    @staticmethod
    def backward(ctx, dq_THK, dk_THK, dv_TNV, dz_THRV, dg_TN, dbeta_TN):
        qkvz_TP, ba_TM, weight_CW, A_log_N, dt_bias_N, starts_T = ctx.saved_tensors
        heads: HeadShape = ctx.heads
        dqkvz_TP = torch.empty_like(qkvz_TP)
        _place_gate(dz_THRV, dqkvz_TP, heads)
        dweight_CW = _backward_convolution(
            qkvz_TP, weight_CW, starts_T, (dq_THK, dk_THK, dv_TNV), dqkvz_TP=dqkvz_TP, heads=heads
        )
        dba_TM, dA_log_N, ddt_bias_N = _backward_gates(ba_TM, A_log_N, dt_bias_N, dg_TN, dbeta_TN, heads)
        return dqkvz_TP, dba_TM, dweight_CW, dA_log_N, ddt_bias_N, None, None


def _backward_convolution(
    qkvz_TP: torch.Tensor,
    weight_CW: torch.Tensor,
    starts_T: torch.Tensor,
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    *,
    dqkvz_TP: torch.Tensor,
    heads: HeadShape,
) -> torch.Tensor:
    """Fill all columns of ``dqkvz_TP`` but those of z; return the gradient of the filters."""
    num_tokens = qkvz_TP.shape[0]
    block = _BACKWARD_TOKENS if num_tokens > _FEW_TOKENS else _FORWARD_TOKENS
    num_blocks = ceil_div(num_tokens, block)
    partial_BSC = torch.empty(num_blocks, _TAPS, heads.channels, dtype=torch.float32, device=qkvz_TP.device)
    dq_THK, dk_THK, dv_TNV = (gradient.contiguous() for gradient in gradients)
    for normed, upstream in ((True, (dq_THK, dk_THK)), (False, (dv_TNV, dv_TNV))):
        convolve_backward_kernel[_grid(heads, normed, num_tokens, block)](
            qkvz_TP,
            weight_CW,
            starts_T,
            *upstream,
            dqkvz_TP,
            partial_BSC,
            num_tokens,
            block,
            **_constants(heads, normed, weight_CW),
            NUM_CHANNELS=heads.channels,
            num_warps=1,
        )
    width = weight_CW.shape[1]
    return partial_BSC.sum(0)[:width].flip(0).t().to(weight_CW.dtype, memory_format=torch.contiguous_format)


def _place_gate(dz_THRV: torch.Tensor, dqkvz_TP: torch.Tensor, heads: HeadShape) -> None:
    """Fill z's columns of ``dqkvz_TP``; a kernel of our own, as torch copies such columns at a third of the speed."""
    columns, num_pairs = heads.group_sizes[-1], dz_THRV.shape[0] * heads.key_heads
    width = next_power_of_2(columns)
    height = max(1, _PLACED_ELEMENTS // width)
    place_gate_kernel[(ceil_div(num_pairs, height),)](
        dz_THRV.contiguous(),
        dqkvz_TP,
        num_pairs,
        SIZE=columns,
        GROUP_COLUMNS=sum(heads.group_sizes),
        BLOCK_P=height,
        BLOCK_C=width,
    )


def _backward_gates(
    ba_TM: torch.Tensor,
    A_log_N: torch.Tensor,
    dt_bias_N: torch.Tensor,
    dg_TN: torch.Tensor,
    dbeta_TN: torch.Tensor,
    heads: HeadShape,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the small projection, of ``A_log`` and of ``dt_bias``."""
    num_tokens = ba_TM.shape[0]
    num_blocks = ceil_div(num_tokens, _GATE_TOKENS)
    dba_TM = torch.empty_like(ba_TM)
    partial_B2N = torch.empty(num_blocks, 2, heads.value_heads, dtype=torch.float32, device=ba_TM.device)
    gates_backward_kernel[(num_blocks,)](
        ba_TM,
        A_log_N,
        dt_bias_N,
        dg_TN.contiguous(),
        dbeta_TN.contiguous(),
        dba_TM,
        partial_B2N,
        num_tokens,
        **_gate_constants(heads),
    )
    dA_log_N, ddt_bias_N = partial_B2N.sum(0)
    return dba_TM, dA_log_N.to(A_log_N.dtype), ddt_bias_N.to(dt_bias_N.dtype)


def _gate_columns(qkvz_TP: torch.Tensor, heads: HeadShape) -> torch.Tensor:
    """The view ``[T, H, R, V]`` of z's columns."""
    grouped_THX = qkvz_TP.unflatten(-1, (heads.key_heads, -1))
    return grouped_THX[..., -heads.group_sizes[-1] :].unflatten(-1, (heads.group, heads.value_dim))


def _grid(heads: HeadShape, normed: bool, num_tokens: int, block: int) -> tuple[int, int]:
    """Heads side by side first, so that programs that run together read whole rows of the projection."""
    return (2 * heads.key_heads if normed else heads.value_heads, ceil_div(num_tokens, block))


def _constants(heads: HeadShape, normed: bool, weight_CW: torch.Tensor) -> dict[str, Any]:
    """What both passes of the convolution are compiled for; ``normed`` says whether for q and k, or for v."""
    size = heads.key_dim if normed else heads.value_dim
    keys = heads.key_heads * heads.key_dim
    return {
        "NORMED": normed,
        "EPS": L2_NORM_EPS,
        "NUM_GROUPS": heads.key_heads,
        "PARTS": 2 if normed else heads.group,
        "GROUP_COLUMNS": sum(heads.group_sizes),
        "FIRST_COLUMN": 0 if normed else 2 * heads.key_dim,
        "FIRST_CHANNEL": 0 if normed else 2 * keys,
        "SIZE": size,
        "WIDTH": weight_CW.shape[1],
        # Offsets are sums of head sizes, which the compiler cannot see through.
        "ALIGNMENT": math.gcd(heads.key_dim, heads.value_dim, 16),
        "BLOCK_C": next_power_of_2(size),
    }


def _gate_constants(heads: HeadShape) -> dict[str, Any]:
    return {
        "NUM_HEADS": heads.value_heads,
        "GROUP": heads.group,
        "BLOCK_T": _GATE_TOKENS,
        "BLOCK_N": next_power_of_2(heads.value_heads),
        "num_warps": 4,
    }
