"""Grouped GEMM of the experts as a persistent kernel in Triton, for Hopper.

Tiles travel by TMA (tensor descriptors), row counts are read on the device. Rows of an expert are cut into tiles,
whose number only the device knows. The kernel is persistent: every multiprocessor gets one program, which takes every
n-th tile and fetches the next one's operands while it stores: the compiler makes one loop of tiles and
steps, where there is no condition between them. So an expert's last tile is moved up until it ends where the expert's
rows do; rows that it shares with the tile before are computed in both, to the same bits. Experts with less than a tile
have a kernel of their own, which stores under a mask. In the gradient of the weights, where rows are summed, an
expert's last rows are loaded apart.

For the experts of Qwen3-Next all products together take a tenth less time than by ``torch.nn.functional.grouped_mm``
(docs/log.md); both give the same bits.

Saved for the backward pass: both operands and where each expert's rows and tiles end.

Letters: R rows, e local experts, I input features, O output features.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from qwen3next_train.kernels.main_grad import MainGrad, main_grad_of
from qwen3next_train.kernels.triton.row_programs import ceil_div, next_power_of_2, num_processors

_TILE_ROWS = 128


class _Launch(NamedTuple):
    """A program's tile (both sides, and how much of the sum at a time), its warps, stages of its loads."""

    side: tuple[int, int]
    step: int
    num_warps: int
    num_stages: int


# The fastest of those tried on an H100 and an H200 for the experts of Qwen3-Next. The first takes 224 of the 227 KiB of
# shared memory there.
_ROWS = _Launch((_TILE_ROWS, 256), 64, 8, 4)
_LESS_THAN_A_TILE = _Launch((_TILE_ROWS, 128), 64, 4, 3)
_MANY_ROWS = _Launch((128, 256), 64, 8, 3)
_FEW_ROWS = _Launch((128, 128), 64, 4, 2)
_FEW_ROWS_PER_EXPERT = 1024
# Two programs fit on a multiprocessor, so that one multiplies while the other reads or writes its tile in fp32.
_MAIN_GRAD = _Launch((128, 128), 64, 4, 3)


def grouped_matmul_triton(x_RI: torch.Tensor, weight_eOI: torch.Tensor, *, counts_e: torch.Tensor) -> torch.Tensor:
    """In bf16 both feature sizes have to be multiples of 8."""
    return _GroupedMatmul.apply(x_RI, weight_eOI, counts_e)


class _GroupedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RI: torch.Tensor, weight_eOI: torch.Tensor, counts_e: torch.Tensor) -> torch.Tensor:
        main_grad = main_grad_of(weight_eOI)
        x_RI, weight_eOI = x_RI.contiguous(), weight_eOI.contiguous()
        experts = counts_e.numel()
        ends_2e = torch.empty(2, experts, dtype=torch.int32, device=x_RI.device)
        block = next_power_of_2(experts)
        _find_ends[(1,)](counts_e, ends_2e, experts, EXPERTS=block, TILE_ROWS=_TILE_ROWS)
        ctx.save_for_backward(x_RI, weight_eOI, ends_2e)
        ctx.main_grad = main_grad
        return _row_products(x_RI, weight_eOI, ends_2e, to_output=True)

    @staticmethod
    def backward(ctx: Any, grad_RO: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x_RI, weight_eOI, ends_2e = ctx.saved_tensors
        grad_RO = grad_RO.contiguous()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = _row_products(grad_RO, weight_eOI, ends_2e, to_output=False)
        if ctx.needs_input_grad[1]:
            if ctx.main_grad is None:
                grad_weight = _weight_gradient(grad_RO, x_RI, ends_2e)
            else:
                _add_weight_gradient(grad_RO, x_RI, ends_2e, ctx.main_grad)
                grad_weight = ctx.main_grad.added_directly(weight_eOI)
        return grad_x, grad_weight, None


def _row_products(
    rows: torch.Tensor, weight_eOI: torch.Tensor, ends_2e: torch.Tensor, *, to_output: bool
) -> torch.Tensor:
    """Each row times its expert's weight: ``[R, I]`` to ``[R, O]``, or transposed ``[R, O]`` to ``[R, I]``."""
    experts, num_out, num_in = weight_eOI.shape
    features, summed = (num_out, num_in) if to_output else (num_in, num_out)
    num_rows = rows.shape[0]
    result = rows.new_empty(num_rows, features)
    if num_rows == 0:
        return result
    # How many tiles there are at most: each expert's last one may overlap the one before.
    tiles = (ceil_div(num_rows, _TILE_ROWS) + experts) * ceil_div(features, _ROWS.side[1])
    # Halves of a tile are stored one after the other: that leaves room for one more stage of loads.
    stored = [_TILE_ROWS, _ROWS.side[1] // 2]
    _multiply_rows[(min(tiles, num_processors(rows.device)),)](
        *_row_operands(rows, weight_eOI, _ROWS, to_output=to_output),
        TensorDescriptor.from_tensor(result, stored),
        ends_2e,
        experts,
        features,
        summed,
        EXPERTS=next_power_of_2(experts),
        **_row_sizes(_ROWS, summed, to_output=to_output),
    )
    launch = _LESS_THAN_A_TILE
    _multiply_few_rows[(experts, ceil_div(features, launch.side[1]))](
        *_row_operands(rows, weight_eOI, launch, to_output=to_output),
        result,
        ends_2e,
        features,
        summed,
        **_row_sizes(launch, summed, to_output=to_output),
    )
    return result


def _row_operands(
    rows: torch.Tensor, weight_eOI: torch.Tensor, launch: _Launch, *, to_output: bool
) -> tuple[TensorDescriptor, TensorDescriptor]:
    """How both operands are fetched, the weights of all experts one below the other."""
    (height, width), step = launch.side, launch.step
    return (
        TensorDescriptor.from_tensor(rows, [height, step]),
        TensorDescriptor.from_tensor(weight_eOI.flatten(0, 1), [width, step] if to_output else [step, width]),
    )


def _row_sizes(launch: _Launch, summed: int, *, to_output: bool) -> dict[str, int | bool]:
    """What both kernels are compiled for."""
    return {
        "ROWS": launch.side[0],
        "COLUMNS": launch.side[1],
        "STEP": launch.step,
        "TO_OUTPUT": to_output,
        "RAGGED": not to_output and summed % launch.step != 0,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }


def _weight_gradient(grad_RO: torch.Tensor, x_RI: torch.Tensor, ends_2e: torch.Tensor) -> torch.Tensor:
    """``grad^T @ x`` over each expert's rows ``[e, O, I]``."""
    (num_rows, num_out), num_in, experts = grad_RO.shape, x_RI.shape[1], ends_2e.shape[1]
    if num_rows == 0:
        return x_RI.new_zeros(experts, num_out, num_in)
    result = x_RI.new_empty(experts, num_out, num_in)
    launch = _FEW_ROWS if num_rows < _FEW_ROWS_PER_EXPERT * experts else _MANY_ROWS
    # Of three dimensions, so that nothing is written beyond an expert's last row.
    stored = TensorDescriptor.from_tensor(result, [1, *launch.side])
    _sum_rows(grad_RO, x_RI, ends_2e, stored, launch, into_main_grad=False, accumulate=False)
    return result


def _add_weight_gradient(grad_RO: torch.Tensor, x_RI: torch.Tensor, ends_2e: torch.Tensor, main_grad: MainGrad) -> None:
    """Add the fp32 sums of :func:`_weight_gradient` to ``main_grad``; or write them where that is empty."""
    if grad_RO.shape[0] == 0:
        main_grad.finish()
        return
    accumulate = not main_grad.is_empty
    _sum_rows(grad_RO, x_RI, ends_2e, main_grad.values, _MAIN_GRAD, into_main_grad=True, accumulate=accumulate)


def _sum_rows(
    grad_RO: torch.Tensor,
    x_RI: torch.Tensor,
    ends_2e: torch.Tensor,
    result: torch.Tensor | TensorDescriptor,
    launch: _Launch,
    *,
    into_main_grad: bool,
    accumulate: bool,
) -> None:
    """A program for each tile of each expert's gradient."""
    num_out, num_in = grad_RO.shape[1], x_RI.shape[1]
    height, width = launch.side
    _sum_over_rows[(ceil_div(num_out, height) * ceil_div(num_in, width), ends_2e.shape[1])](
        TensorDescriptor.from_tensor(grad_RO, [launch.step, height]),
        TensorDescriptor.from_tensor(x_RI, [launch.step, width]),
        grad_RO,
        x_RI,
        result,
        ends_2e,
        num_out,
        num_in,
        HEIGHT=height,
        WIDTH=width,
        STEP=launch.step,
        INTO_MAIN_GRAD=into_main_grad,
        ACCUMULATE=accumulate,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )


@triton.jit
def _find_ends(counts, ends, num_experts, EXPERTS: tl.constexpr, TILE_ROWS: tl.constexpr):
    """End of each expert's rows, and of its tiles: none, if it has less than one."""
    expert = tl.arange(0, EXPERTS)
    count = tl.load(counts + expert, mask=expert < num_experts, other=0).to(tl.int32)
    tl.store(ends + expert, tl.cumsum(count, axis=0), mask=expert < num_experts)
    tiles = tl.where(count < TILE_ROWS, 0, (count + TILE_ROWS - 1) // TILE_ROWS)
    tl.store(ends + num_experts + expert, tl.cumsum(tiles, axis=0), mask=expert < num_experts)


@triton.jit
def _start(ends, expert):
    """First row, or tile, of an expert: where those of the one before end."""
    return tl.load(ends + expert - 1, mask=expert > 0, other=0)


@triton.jit
def _products(
    rows,
    weight,
    first_row,
    expert,
    first_column,
    features,
    summed,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    TO_OUTPUT: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """One tile of an expert's products."""
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    # Beyond the last feature the copies are filled with zeros, but for weights that are summed over their outputs:
    # there the next expert's follow, whose infinities must not meet the zeros of the rows.
    for first in range(0, summed, STEP):
        left = rows.load([first_row, first])
        if TO_OUTPUT:
            right = weight.load([expert * features + first_column, first])
            total = tl.dot(left, right.T, total)
        else:
            right = weight.load([expert * summed + first, first_column])
            if RAGGED:
                right = tl.where((first + tl.arange(0, STEP) < summed)[:, None], right, 0.0)
            total = tl.dot(left, right, total)
    return total


@triton.jit
def _multiply_rows(
    rows,
    weight,
    result,
    ends,
    num_experts,
    features,
    summed,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    TO_OUTPUT: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Every n-th tile of the result. Tiles of the same rows are neighbours, then those of the same expert."""
    blocks = tl.cdiv(features, COLUMNS)
    index = tl.arange(0, EXPERTS)
    tile_ends = tl.load(ends + num_experts + index, mask=index < num_experts, other=2**31 - 1)
    num_tiles = tl.load(ends + 2 * num_experts - 1) * blocks
    for number in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=True):
        tile, first_column = number // blocks, number % blocks * COLUMNS
        expert = tl.sum((tile_ends <= tile).to(tl.int32), axis=0)
        first_tile, start = _start(ends + num_experts, expert), _start(ends, expert)
        first_row = tl.minimum(start + (tile - first_tile) * ROWS, tl.load(ends + expert) - ROWS)
        total = _products(
            rows, weight, first_row, expert, first_column, features, summed, ROWS, COLUMNS, STEP, TO_OUTPUT, RAGGED
        )
        left, right = total.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()
        # Columns beyond the last are not written.
        result.store([first_row, first_column], left.to(result.dtype))
        result.store([first_row, first_column + COLUMNS // 2], right.to(result.dtype))


@triton.jit
def _multiply_few_rows(
    rows,
    weight,
    result,
    ends,
    features,
    summed,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    TO_OUTPUT: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """One tile of columns of an expert with less than a tile of rows; other experts have none here."""
    expert, first_column = tl.program_id(0), tl.program_id(1) * COLUMNS
    start = _start(ends, expert)
    count = tl.load(ends + expert) - start
    if (count > 0) & (count < ROWS):
        # The rows behind are the next expert's: their products are not stored.
        total = _products(
            rows, weight, start, expert, first_column, features, summed, ROWS, COLUMNS, STEP, TO_OUTPUT, RAGGED
        )
        slot, column = tl.arange(0, ROWS), first_column + tl.arange(0, COLUMNS)
        place = result + (start + slot).to(tl.int64)[:, None] * features + column[None, :]
        mask = (slot < count)[:, None] & (column < features)[None, :]
        tl.store(place, total.to(result.dtype.element_ty), mask=mask)


@triton.jit
def _sum_over_rows(
    grad,
    x,
    grad_ptr,
    x_ptr,
    result,
    ends,
    num_out,
    num_in,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
    INTO_MAIN_GRAD: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """One tile of the gradient of one expert's weight; zeros if the expert has no rows."""
    blocks = tl.cdiv(num_in, WIDTH)
    first_out, first_in = tl.program_id(0) // blocks * HEIGHT, tl.program_id(0) % blocks * WIDTH
    expert = tl.program_id(1)
    start = _start(ends, expert)
    end = tl.load(ends + expert)
    whole_steps = start + (end - start) // STEP * STEP
    if INTO_MAIN_GRAD:
        row, column = first_out + tl.arange(0, HEIGHT), first_in + tl.arange(0, WIDTH)
        place = result + (expert.to(tl.int64) * num_out + row)[:, None] * num_in + column[None, :]
        inside = (row < num_out)[:, None] & (column < num_in)[None, :]
    # The products are added to what is there: behind them a second tile would not fit into registers.
    total = tl.zeros([HEIGHT, WIDTH], dtype=tl.float32)
    if ACCUMULATE:
        total = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    for first in range(start, whole_steps, STEP):
        total = tl.dot(grad.load([first, first_out]).T, x.load([first, first_in]), total)
    if whole_steps < end:
        out_column, in_column = first_out + tl.arange(0, HEIGHT), first_in + tl.arange(0, WIDTH)
        last_row = (whole_steps + tl.arange(0, STEP)).to(tl.int64)
        left_place = grad_ptr + last_row[:, None] * num_out + out_column[None, :]
        left = tl.load(left_place, mask=(last_row < end)[:, None] & (out_column < num_out)[None, :], other=0.0)
        right_place = x_ptr + last_row[:, None] * num_in + in_column[None, :]
        right = tl.load(right_place, mask=(last_row < end)[:, None] & (in_column < num_in)[None, :], other=0.0)
        total = tl.dot(left.T, right, total)
    if INTO_MAIN_GRAD:
        tl.store(place, total.to(result.dtype.element_ty), mask=inside)
    else:
        narrow = total.to(grad_ptr.dtype.element_ty)
        result.store([expert, first_out, first_in], narrow.reshape(1, HEIGHT, WIDTH))
