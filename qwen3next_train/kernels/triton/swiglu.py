"""SwiGLU in one pass each way, in fp32, rounded once: the reference rounds SiLU and the product as well.

Saved for the backward pass: the inputs. Letters: R rows, F expert hidden, B blocks of a row's columns.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from qwen3next_train.kernels.triton.row_programs import ceil_div, dense_rows, next_power_of_2

_TILE = 4096
"""Outputs of a program."""


def swiglu_triton(gate_up: torch.Tensor, weights_R: torch.Tensor | None = None) -> torch.Tensor:
    """Computed in fp32 and rounded once."""
    return _SwiGlu.apply(gate_up, weights_R)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor, weights_R: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(gate_up, weights_R)
        gate_up = dense_rows(gate_up)
        rows, features = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, features)
        grid, sizes = _tiles(rows, features)
        weights = None if weights_R is None else weights_R.contiguous()
        _forward[grid](gate_up, weights, out, rows, features, gate_up.stride(0), WEIGHTED=weights is not None, **sizes)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        gate_up, weights_R = ctx.saved_tensors
        gate_up, grad = dense_rows(gate_up), dense_rows(grad)
        rows, features = grad.shape
        grad_gate_up = gate_up.new_empty(gate_up.shape)
        grid, sizes = _tiles(rows, features)
        weights = None if weights_R is None else weights_R.contiguous()
        partial_RB = None if weights is None else weights.new_empty(rows, grid[1])
        _backward[grid](
            gate_up,
            weights,
            grad,
            grad_gate_up,
            partial_RB,
            rows,
            features,
            gate_up.stride(0),
            grad.stride(0),
            WEIGHTED=weights is not None,
            **sizes,
        )
        if partial_RB is None:
            return grad_gate_up, None
        return grad_gate_up, partial_RB.squeeze(1) if grid[1] == 1 else partial_RB.sum(1)


def _tiles(rows: int, features: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and compile-time sizes: whole rows where they fit."""
    columns = min(1024, next_power_of_2(features))
    height = _TILE // columns
    return (ceil_div(rows, height), ceil_div(features, columns)), {"ROWS": height, "COLUMNS": columns}


@triton.jit
def _tile(num_rows, features, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows and columns of this program, and which of them exist."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row, column, (row < num_rows) & (column < features)


@triton.jit
def _forward(
    gate_up,
    weights,
    out,
    num_rows,
    features,
    stride,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, column, mask = _tile(num_rows, features, ROWS, COLUMNS)
    place = gate_up + row * stride + column
    gate = tl.load(place, mask=mask, other=0).to(tl.float32)
    up = tl.load(place + features, mask=mask, other=0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    if WEIGHTED:
        value *= tl.load(weights + row, mask=row < num_rows, other=0)
    tl.store(out + row * features + column, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    gate_up,
    weights,
    grad,
    grad_gate_up,
    partial,
    num_rows,
    features,
    stride,
    grad_stride,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, column, mask = _tile(num_rows, features, ROWS, COLUMNS)
    place = gate_up + row * stride + column
    gate = tl.load(place, mask=mask, other=0).to(tl.float32)
    up = tl.load(place + features, mask=mask, other=0).to(tl.float32)
    upstream = tl.load(grad + row * grad_stride + column, mask=mask, other=0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    if WEIGHTED:
        sums = tl.sum(upstream * gate * sigmoid * up, axis=1, keep_dims=True)
        tl.store(partial + row * tl.num_programs(1) + tl.program_id(1), sums, mask=row < num_rows)
        upstream *= tl.load(weights + row, mask=row < num_rows, other=0)
    grad_gate = upstream * up * sigmoid * (1 + gate * (1 - sigmoid))
    grad_up = upstream * gate * sigmoid
    target = grad_gate_up + row * (2 * features) + column
    tl.store(target, grad_gate.to(grad_gate_up.dtype.element_ty), mask=mask)
    tl.store(target + features, grad_up.to(grad_gate_up.dtype.element_ty), mask=mask)
