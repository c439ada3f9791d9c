"""Gated addition in one pass each way, in fp32, rounded once: the reference rounds after each operation.

Saved for the backward pass: branch, x and weight; the logit is computed again from the row of x that is read anyway.
The gradient of the result is that of residual and base: both get the same tensor, which nobody may change in place.

Letters: T rows, D columns, G programs of the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from qwen3next_train.kernels.triton.row_programs import dense_rows, next_power_of_2, num_row_programs, row_warps


def shared_expert_combine_triton(
    residual_TD: torch.Tensor,
    base_TD: torch.Tensor,
    branch_TD: torch.Tensor,
    x_TD: torch.Tensor,
    weight_1D: torch.Tensor,
) -> torch.Tensor:
    """Computed in fp32 and rounded once; residual and base get one gradient tensor between them."""
    return _SharedExpertCombine.apply(residual_TD, base_TD, branch_TD, x_TD, weight_1D)


class _SharedExpertCombine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        residual_TD: torch.Tensor,
        base_TD: torch.Tensor,
        branch_TD: torch.Tensor,
        x_TD: torch.Tensor,
        weight_1D: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(branch_TD, x_TD, weight_1D)
        rows = [dense_rows(tensor) for tensor in (residual_TD, base_TD, branch_TD, x_TD)]
        out_TD = base_TD.new_empty(base_TD.shape)
        strides = [tensor.stride(0) for tensor in rows]
        _forward[(base_TD.shape[0],)](*rows, weight_1D.contiguous(), out_TD, *strides, **_sizes(base_TD))
        return out_TD

    @staticmethod
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        branch_TD, x_TD, weight_1D = ctx.saved_tensors
        dense_TD, branch_TD, x_TD = dense_rows(grad_TD), dense_rows(branch_TD), dense_rows(x_TD)
        num_rows = x_TD.shape[0]
        grad_branch_TD, grad_x_TD = branch_TD.new_empty(branch_TD.shape), x_TD.new_empty(x_TD.shape)
        programs = num_row_programs(num_rows, x_TD.device)
        partial_GD = torch.empty(programs, x_TD.shape[1], dtype=torch.float32, device=x_TD.device)
        _backward[(programs,)](
            dense_TD,
            branch_TD,
            x_TD,
            weight_1D.contiguous(),
            grad_branch_TD,
            grad_x_TD,
            partial_GD,
            num_rows,
            dense_TD.stride(0),
            branch_TD.stride(0),
            x_TD.stride(0),
            **_sizes(x_TD),
        )
        grad_1D = partial_GD.sum(0, keepdim=True).to(weight_1D.dtype)
        return grad_TD, grad_TD, grad_branch_TD, grad_x_TD, grad_1D


def _sizes(x: torch.Tensor) -> dict[str, int]:
    """Compile-time sizes: a program holds one row at a time."""
    block = next_power_of_2(x.shape[1])
    return {"COLUMNS": x.shape[1], "BLOCK": block, "num_warps": row_warps(block)}


@triton.jit
def _forward(
    residual,
    base,
    branch,
    x,
    weight,
    out,
    residual_stride,
    base_stride,
    branch_stride,
    x_stride,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < COLUMNS
    factor = tl.load(weight + column, mask=mask, other=0).to(tl.float32)
    known = tl.load(x + row * x_stride + column, mask=mask, other=0).to(tl.float32)
    value = tl.load(branch + row * branch_stride + column, mask=mask, other=0).to(tl.float32)
    total = tl.load(base + row * base_stride + column, mask=mask, other=0).to(tl.float32)
    total += value * tl.sigmoid(tl.sum(known * factor, axis=0))
    total += tl.load(residual + row * residual_stride + column, mask=mask, other=0).to(tl.float32)
    tl.store(out + row * COLUMNS + column, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    grad,
    branch,
    x,
    weight,
    grad_branch,
    grad_x,
    partial,
    num_rows,
    grad_stride,
    branch_stride,
    x_stride,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Every n-th row, and the sum of these rows' gradients of the weight."""
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    mask = column < COLUMNS
    factor = tl.load(weight + column, mask=mask, other=0).to(tl.float32)
    grad_weight = tl.zeros([BLOCK], dtype=tl.float32)
    row = program.to(tl.int64)
    for _ in range(program, num_rows, tl.num_programs(0)):
        known = tl.load(x + row * x_stride + column, mask=mask, other=0).to(tl.float32)
        upstream = tl.load(grad + row * grad_stride + column, mask=mask, other=0).to(tl.float32)
        value = tl.load(branch + row * branch_stride + column, mask=mask, other=0).to(tl.float32)
        gate = tl.sigmoid(tl.sum(known * factor, axis=0))
        slope = tl.sum(upstream * value, axis=0) * gate * (1 - gate)
        tl.store(grad_branch + row * COLUMNS + column, (upstream * gate).to(grad_branch.dtype.element_ty), mask=mask)
        tl.store(grad_x + row * COLUMNS + column, (slope * factor).to(grad_x.dtype.element_ty), mask=mask)
        grad_weight += slope * known
        row += tl.num_programs(0)
    tl.store(partial + program.to(tl.int64) * COLUMNS + column, grad_weight, mask=mask)
