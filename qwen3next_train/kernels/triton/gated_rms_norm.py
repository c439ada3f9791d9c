"""Gated RMSNorm in one pass each way (Triton).

Kept for the backward pass are the inputs alone. The gate is read where it lies, be it a few columns of a projection.

Letters: V value head dim, P programs of the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from qwen3next_train.kernels.triton.row_programs import ceil_div, next_power_of_2

_BLOCK_R = 16
_BACKWARD_PROGRAMS = 2048
"""At most so many partial sums of the weight's gradient; a number of its own, so that every device adds up alike."""


def gated_rms_norm_triton(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
    """One kernel each way; ``x`` is copied if it is not contiguous."""
    return _GatedRmsNorm.apply(x, gate, weight, eps)


class _GatedRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate, weight, eps: float) -> torch.Tensor:
        x, gate = x.contiguous(), _readable(gate)
        num_rows = x.numel() // x.shape[-1]
        out = torch.empty(x.shape, dtype=gate.dtype, device=x.device)
        _forward_kernel[(ceil_div(num_rows, _BLOCK_R),)](x, gate, weight, out, num_rows, eps, **_constants(gate))
        ctx.save_for_backward(x, gate, weight)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx, upstream):
        x, gate, weight = ctx.saved_tensors
        size = x.shape[-1]
        num_rows = x.numel() // size
        num_programs = min(ceil_div(num_rows, _BLOCK_R), _BACKWARD_PROGRAMS)
        dx = torch.empty_like(x)
        dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        partial_PV = torch.empty(num_programs, size, dtype=torch.float32, device=x.device)
        _backward_kernel[(num_programs,)](
            x, gate, weight, upstream.contiguous(), dx, dgate, partial_PV, num_rows, ctx.eps, **_constants(gate)
        )
        return dx, dgate, partial_PV.sum(0).to(weight.dtype), None


def _readable(gate: torch.Tensor) -> torch.Tensor:
    """The gate itself, if its rows can be reached by three strides, else a copy."""
    return gate if gate.stride(-1) == 1 and gate.dim() <= 4 else gate.contiguous()


def _constants(gate: torch.Tensor) -> dict[str, Any]:
    """Sizes and strides of the gate's leading dimensions, of which there are at most three."""
    missing = 4 - gate.dim()
    shape, strides = (*[1] * missing, *gate.shape), (*[0] * missing, *gate.stride())
    return {
        "MIDDLE": shape[1],
        "INNER": shape[2],
        "OUTER_STRIDE": strides[0],
        "MIDDLE_STRIDE": strides[1],
        "INNER_STRIDE": strides[2],
        "SIZE": shape[3],
        "BLOCK_R": _BLOCK_R,
        "BLOCK_V": next_power_of_2(shape[3]),
        "num_warps": 4,
    }


@triton.jit
def _gate_rows(
    rows,
    MIDDLE: tl.constexpr,
    INNER: tl.constexpr,
    OUTER_STRIDE: tl.constexpr,
    MIDDLE_STRIDE: tl.constexpr,
    INNER_STRIDE: tl.constexpr,
):
    """Offset of each row of the gate."""
    outer = rows // (MIDDLE * INNER)
    return outer * OUTER_STRIDE + rows // INNER % MIDDLE * MIDDLE_STRIDE + rows % INNER * INNER_STRIDE


@triton.jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    x,
    gate,
    weight,
    out,
    num_rows,
    eps,
    MIDDLE: tl.constexpr,
    INNER: tl.constexpr,
    OUTER_STRIDE: tl.constexpr,
    MIDDLE_STRIDE: tl.constexpr,
    INNER_STRIDE: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    v = tl.arange(0, BLOCK_V)
    inside = (rows < num_rows)[:, None] & (v < SIZE)[None, :]
    place = rows[:, None] * SIZE + v[None, :]
    gate_place = _gate_rows(rows, MIDDLE, INNER, OUTER_STRIDE, MIDDLE_STRIDE, INNER_STRIDE)[:, None] + v[None, :]
    w = tl.load(weight + v, mask=v < SIZE, other=0.0).to(tl.float32)
    values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(gate + gate_place, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 1) / SIZE + eps)
    tl.store(out + place, values * scale[:, None] * w[None, :] * (z * tl.sigmoid(z)), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _backward_kernel(
    x,
    gate,
    weight,
    upstream,
    dx,
    dgate,
    partial,
    num_rows,
    eps,
    MIDDLE: tl.constexpr,
    INNER: tl.constexpr,
    OUTER_STRIDE: tl.constexpr,
    MIDDLE_STRIDE: tl.constexpr,
    INNER_STRIDE: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    v = tl.arange(0, BLOCK_V)
    w = tl.load(weight + v, mask=v < SIZE, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_R, BLOCK_V), dtype=tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_R), tl.num_programs(0)):
        rows = tl.cast(block, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        inside = (rows < num_rows)[:, None] & (v < SIZE)[None, :]
        place = rows[:, None] * SIZE + v[None, :]
        gate_place = _gate_rows(rows, MIDDLE, INNER, OUTER_STRIDE, MIDDLE_STRIDE, INNER_STRIDE)[:, None] + v[None, :]
        values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        z = tl.load(gate + gate_place, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(upstream + place, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(values * values, 1) / SIZE + eps)[:, None]
        normed = values * scale
        opening = tl.sigmoid(z)
        dweight += grad * normed * (z * opening)
        weighted = grad * w[None, :]
        dz = weighted * normed * (opening * (1.0 + z * (1.0 - opening)))
        dnormed = weighted * (z * opening)
        mean = tl.sum(dnormed * normed, 1)[:, None] / SIZE
        tl.store(dx + place, scale * (dnormed - normed * mean), mask=inside)
        tl.store(dgate + place, dz, mask=inside)
    tl.store(partial + tl.program_id(0) * SIZE + v, tl.sum(dweight, 0), mask=v < SIZE)
