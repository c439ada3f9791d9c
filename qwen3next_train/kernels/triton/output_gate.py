"""The output gate by one Triton kernel each way, in fp32 and rounded once.

Saved for the backward pass: both inputs; the sigmoid is computed again.

Letters: T tokens, N heads, H head dim, P = T N heads of all tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwen3next_train.kernels.triton.row_programs import ceil_div, next_power_of_2, row_warps

_ELEMENTS = 4096
"""Elements of a program's block of heads, at most."""


def output_gate_triton(x_TNH: torch.Tensor, gate_TNH: torch.Tensor) -> torch.Tensor:
    """Computed in fp32 and rounded once."""
    return _OutputGate.apply(x_TNH, gate_TNH)


class _OutputGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TNH, gate_TNH):
        ctx.save_for_backward(x_TNH, gate_TNH)
        x_TNH, gate_TNH = _dense_heads(x_TNH), _dense_heads(gate_TNH)
        out_TNH = torch.empty(x_TNH.shape, dtype=x_TNH.dtype, device=x_TNH.device)
        if out_TNH.numel():
            grid, sizes = _layout(x_TNH)
            _forward[grid](x_TNH, gate_TNH, out_TNH, *_shape(x_TNH), *_strides(x_TNH), *_strides(gate_TNH), **sizes)
        return out_TNH

    @staticmethod
    def backward(ctx, grad_TNH):
        x_TNH, gate_TNH, grad_TNH = map(_dense_heads, (*ctx.saved_tensors, grad_TNH))
        grad_x_TNH, grad_gate_TNH = (torch.empty(x_TNH.shape, dtype=x_TNH.dtype, device=x_TNH.device) for _ in range(2))
        if grad_x_TNH.numel():
            grid, sizes = _layout(x_TNH)
            strides = (*_strides(x_TNH), *_strides(gate_TNH), *_strides(grad_TNH))
            _backward[grid](x_TNH, gate_TNH, grad_TNH, grad_x_TNH, grad_gate_TNH, *_shape(x_TNH), *strides, **sizes)
        return grad_x_TNH, grad_gate_TNH


def _dense_heads(x_TNH: torch.Tensor) -> torch.Tensor:
    return x_TNH if x_TNH.stride(2) == 1 else x_TNH.contiguous()


def _shape(x_TNH: torch.Tensor) -> tuple[int, int]:
    return x_TNH.shape[0] * x_TNH.shape[1], x_TNH.shape[1]


def _strides(x_TNH: torch.Tensor) -> tuple[int, int]:
    return x_TNH.stride(0), x_TNH.stride(1)


def _layout(x_TNH: torch.Tensor) -> tuple[tuple[int], dict[str, int]]:
    """Grid and compile-time sizes."""
    head_dim = x_TNH.shape[2]
    block = next_power_of_2(head_dim)
    heads = max(1, min(16, _ELEMENTS // block))
    sizes = {"SIZE": head_dim, "BLOCK": block, "HEADS": heads, "num_warps": row_warps(heads * block)}
    return (ceil_div(x_TNH.shape[0] * x_TNH.shape[1], heads),), sizes


@triton.jit
def _forward(
    x_ptr,
    gate_ptr,
    out_ptr,
    num_heads_of_all,
    num_heads,
    x_token_stride,
    x_head_stride,
    gate_token_stride,
    gate_head_stride,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
):
    head = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (head < num_heads_of_all)[:, None] & (column < SIZE)
    token, index = (head // num_heads).to(tl.int64), head % num_heads
    x_place = x_ptr + (token * x_token_stride + index * x_head_stride)[:, None] + column
    gate_place = gate_ptr + (token * gate_token_stride + index * gate_head_stride)[:, None] + column
    x = tl.load(x_place, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + (head.to(tl.int64) * SIZE)[:, None] + column, x * tl.sigmoid(gate), mask=inside)


@triton.jit
def _backward(
    x_ptr,
    gate_ptr,
    grad_ptr,
    grad_x_ptr,
    grad_gate_ptr,
    num_heads_of_all,
    num_heads,
    x_token_stride,
    x_head_stride,
    gate_token_stride,
    gate_head_stride,
    grad_token_stride,
    grad_head_stride,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
):
    head = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (head < num_heads_of_all)[:, None] & (column < SIZE)
    token, index = (head // num_heads).to(tl.int64), head % num_heads
    x_place = x_ptr + (token * x_token_stride + index * x_head_stride)[:, None] + column
    gate_place = gate_ptr + (token * gate_token_stride + index * gate_head_stride)[:, None] + column
    grad_place = grad_ptr + (token * grad_token_stride + index * grad_head_stride)[:, None] + column
    x = tl.load(x_place, mask=inside, other=0.0).to(tl.float32)
    gate = tl.sigmoid(tl.load(gate_place, mask=inside, other=0.0).to(tl.float32))
    grad = tl.load(grad_place, mask=inside, other=0.0).to(tl.float32)
    place = (head.to(tl.int64) * SIZE)[:, None] + column
    tl.store(grad_x_ptr + place, grad * gate, mask=inside)
    tl.store(grad_gate_ptr + place, grad * x * gate * (1.0 - gate), mask=inside)
