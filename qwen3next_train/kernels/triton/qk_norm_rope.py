"""Fused QK norm + RoPE by one Triton kernel each way.

A program takes several heads, of one token or of several. The partner of a rotated dim is read again, from the cache.
The backward adds up in fp32 what plain torch rounds in between.

Saved for the backward pass: the input (a view of the projection), the weight and the shared angles.

Letters: T tokens, N heads, H head dim, r rotated dims, P = T N heads of all tokens, G programs of the backward pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwen3next_train.kernels.triton.row_programs import ceil_div, next_power_of_2, num_row_programs, row_warps

_ELEMENTS = 4096
"""Elements of a program's block of heads, at most."""


def qk_norm_rope_triton(
    x_TNH: torch.Tensor, weight_H: torch.Tensor, cos_T1r: torch.Tensor, sin_T1r: torch.Tensor, *, eps: float
) -> torch.Tensor:
    """One kernel each way; what plain torch rounds between norm and rotation, the backward does not."""
    return _QkNormRope.apply(x_TNH, weight_H, cos_T1r, sin_T1r, eps)


class _QkNormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TNH, weight_H, cos_T1r, sin_T1r, eps):
        ctx.save_for_backward(x_TNH, weight_H, cos_T1r, sin_T1r)
        ctx.eps = eps
        x_TNH = _dense_heads(x_TNH)
        num_tokens, heads, _ = x_TNH.shape
        out_TNH = torch.empty(x_TNH.shape, dtype=x_TNH.dtype, device=x_TNH.device)
        sizes = _sizes(x_TNH, cos_T1r)
        if out_TNH.numel():
            _forward[(ceil_div(num_tokens * heads, sizes["HEADS"]),)](
                x_TNH,
                weight_H,
                cos_T1r.contiguous(),
                sin_T1r.contiguous(),
                out_TNH,
                num_tokens * heads,
                heads,
                x_TNH.stride(0),
                x_TNH.stride(1),
                eps,
                **sizes,
            )
        return out_TNH

    @staticmethod
    def backward(ctx, grad_TNH):
        x_TNH, weight_H, cos_T1r, sin_T1r = ctx.saved_tensors
        x_TNH, grad_TNH = _dense_heads(x_TNH), _dense_heads(grad_TNH)
        num_tokens, heads, head_dim = x_TNH.shape
        grad_x_TNH = torch.empty(x_TNH.shape, dtype=x_TNH.dtype, device=x_TNH.device)
        if grad_x_TNH.numel() == 0:
            return grad_x_TNH, torch.zeros_like(weight_H), None, None, None
        sizes = _sizes(x_TNH, cos_T1r)
        programs = num_row_programs(ceil_div(num_tokens * heads, sizes["HEADS"]), x_TNH.device)
        partial_GH = torch.empty(programs, head_dim, dtype=torch.float32, device=x_TNH.device)
        _backward[(programs,)](
            x_TNH,
            weight_H,
            cos_T1r.contiguous(),
            sin_T1r.contiguous(),
            grad_TNH,
            grad_x_TNH,
            partial_GH,
            num_tokens * heads,
            heads,
            x_TNH.stride(0),
            x_TNH.stride(1),
            grad_TNH.stride(0),
            grad_TNH.stride(1),
            ctx.eps,
            **sizes,
        )
        return grad_x_TNH, partial_GH.sum(0).to(weight_H.dtype), None, None, None


def _dense_heads(x_TNH: torch.Tensor) -> torch.Tensor:
    return x_TNH if x_TNH.stride(2) == 1 else x_TNH.contiguous()


def _sizes(x_TNH: torch.Tensor, cos_T1r: torch.Tensor) -> dict[str, int]:
    """Compile-time sizes: a program's block is a power of two of heads and of their dims."""
    head_dim = x_TNH.shape[2]
    block = next_power_of_2(head_dim)
    heads = max(1, min(16, _ELEMENTS // block))
    return {
        "SIZE": head_dim,
        "BLOCK": block,
        "HEADS": heads,
        "ROTATED": cos_T1r.shape[-1],
        "num_warps": row_warps(heads * block),
    }


@triton.jit
def _partner(column, ROTATED: tl.constexpr):
    """The dim that is turned together with this one."""
    return tl.where(column < ROTATED // 2, column + ROTATED // 2, column - ROTATED // 2)


@triton.jit
def _forward(
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    num_heads_of_all,
    num_heads,
    token_stride,
    head_stride,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    ROTATED: tl.constexpr,
):
    dtype = x_ptr.dtype.element_ty
    head = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, BLOCK)
    real = (head < num_heads_of_all)[:, None]
    inside = real & (column < SIZE)[None, :]
    turned = real & (column < ROTATED)[None, :]
    partner = _partner(column, ROTATED)
    token = (head // num_heads).to(tl.int64)
    start = x_ptr + (token * token_stride + (head % num_heads) * head_stride)[:, None]
    angle = (token * ROTATED)[:, None] + column[None, :]
    x = tl.load(start + column[None, :], mask=inside, other=0.0).to(tl.float32)
    other = tl.load(start + partner[None, :], mask=turned, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + angle, mask=turned, other=1.0)
    sin = tl.load(sin_ptr + angle, mask=turned, other=0.0)
    weight = 1.0 + tl.load(weight_ptr + column, mask=column < SIZE, other=0.0).to(tl.float32)
    other_weight = 1.0 + tl.load(weight_ptr + partner, mask=column < ROTATED, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / SIZE + eps)[:, None]
    normed = (x * scale * weight[None, :]).to(dtype).to(tl.float32)
    other_normed = (other * scale * other_weight[None, :]).to(dtype).to(tl.float32)
    place = out_ptr + (head.to(tl.int64) * SIZE)[:, None] + column[None, :]
    tl.store(place, normed * cos + other_normed * sin, mask=inside)


@triton.jit
def _backward(
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    grad_ptr,
    grad_x_ptr,
    partial_ptr,
    num_heads_of_all,
    num_heads,
    token_stride,
    head_stride,
    grad_token_stride,
    grad_head_stride,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    ROTATED: tl.constexpr,
):
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    partner = _partner(column, ROTATED)
    weight = 1.0 + tl.load(weight_ptr + column, mask=column < SIZE, other=0.0).to(tl.float32)
    grad_weight = tl.zeros([BLOCK], dtype=tl.float32)
    for block in range(program, tl.cdiv(num_heads_of_all, HEADS), tl.num_programs(0)):
        head = block * HEADS + tl.arange(0, HEADS)
        real = (head < num_heads_of_all)[:, None]
        inside = real & (column < SIZE)[None, :]
        turned = real & (column < ROTATED)[None, :]
        token = (head // num_heads).to(tl.int64)
        index = head % num_heads
        x_place = x_ptr + (token * token_stride + index * head_stride)[:, None] + column[None, :]
        start = grad_ptr + (token * grad_token_stride + index * grad_head_stride)[:, None]
        angle = (token * ROTATED)[:, None]
        x = tl.load(x_place, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(start + column[None, :], mask=inside, other=0.0).to(tl.float32)
        other = tl.load(start + partner[None, :], mask=turned, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + angle + column[None, :], mask=turned, other=1.0)
        other_sin = tl.load(sin_ptr + angle + partner[None, :], mask=turned, other=0.0)
        grad = grad * cos + other * other_sin
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / SIZE + eps)[:, None]
        normed = x * scale
        grad_weight += tl.sum(grad * normed, axis=0)
        grad = grad * weight[None, :]
        mean = (tl.sum(grad * normed, axis=1) / SIZE)[:, None]
        place = grad_x_ptr + (head.to(tl.int64) * SIZE)[:, None] + column[None, :]
        tl.store(place, scale * (grad - normed * mean), mask=inside)
    tl.store(partial_ptr + program.to(tl.int64) * SIZE + column, grad_weight, mask=column < SIZE)
