"""Token permutation by Triton kernels.

Sorting counts: how often each expert occurs in each block of pairs, where each block's rows of each expert begin, and
how many equal ids stand before a pair in its block. Only integers are counted and nothing is added atomically.

Rows move token by token: a program reads one token and writes its K rows, or reads its K rows and writes the token.
Rows of one token lie far apart, but each is one piece of D elements.

Saved for the backward pass: ``row_TK``.

Letters: T tokens, D hidden, K experts per token, E experts, R routed rows, P = T K pairs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from qwen3next_train.kernels.routing import Permutation, TokenPermutation
from qwen3next_train.kernels.triton.row_programs import ceil_div, dense_rows, next_power_of_2, row_warps

_PAIRS = 128
"""Pairs of a block; each is compared with each."""
_EXPERTS = 64
"""Experts that a block's pairs are compared with at a time."""
_MOVED_PAIRS = 512
"""Pairs whose weights a program moves."""


class TokenPermutationTriton(TokenPermutation):
    """Kernels that count, and that move rows token by token."""

    def sort(self, expert_ids_TK: torch.Tensor, num_experts: int, num_rows: int) -> Permutation:
        """By counting, in three kernels."""
        ids_TK = expert_ids_TK.contiguous()
        num_pairs, blocks = ids_TK.numel(), ceil_div(ids_TK.numel(), _PAIRS)
        before = torch.empty(blocks, num_experts, dtype=torch.int32, device=ids_TK.device)
        counts_E = torch.empty(num_experts, dtype=torch.int64, device=ids_TK.device)
        row_TK = torch.empty_like(ids_TK)
        token_R = torch.empty(num_rows, dtype=torch.int64, device=ids_TK.device)
        sizes = {"PAIRS": _PAIRS, "EXPERTS": _EXPERTS}
        _count[(blocks,)](ids_TK, before, num_pairs, num_experts, **sizes)
        _scan[(ceil_div(num_experts, 16),)](before, counts_E, blocks, num_experts, BLOCKS=128, EXPERTS=16)
        _place[(blocks,)](
            ids_TK,
            before,
            counts_E,
            row_TK,
            token_R,
            num_pairs,
            num_experts,
            num_rows,
            TOP_K=ids_TK.shape[1],
            num_warps=8,
            **sizes,
        )
        return Permutation(token_R, row_TK, counts_E)

    def permute(self, x_TD: torch.Tensor, permutation: Permutation) -> torch.Tensor:
        """A program reads one token and writes its K rows."""
        return _Permute.apply(x_TD, permutation.row_TK, permutation.token_R.shape[0])

    def permute_weights(self, weights_TK: torch.Tensor, permutation: Permutation) -> torch.Tensor:
        """A program moves the weights of many pairs."""
        return _PermuteWeights.apply(weights_TK, permutation.row_TK, permutation.token_R.shape[0])

    def unpermute(self, rows_RD: torch.Tensor, permutation: Permutation) -> torch.Tensor:
        """A program reads a token's K rows and adds them up in the order of k."""
        return _Unpermute.apply(rows_RD, permutation.row_TK)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, row_TK: torch.Tensor, num_rows: int) -> torch.Tensor:
        ctx.save_for_backward(row_TK)
        return _copy_to_rows(x_TD, row_TK, num_rows)

    @staticmethod
    def backward(ctx: Any, grad_RD: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (row_TK,) = ctx.saved_tensors
        return _sum_rows(grad_RD, row_TK), None, None


class _PermuteWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights_TK: torch.Tensor, row_TK: torch.Tensor, num_rows: int) -> torch.Tensor:
        ctx.save_for_backward(row_TK)
        weights_TK = weights_TK.contiguous()
        weights_R = weights_TK.new_empty(num_rows)
        _scatter_pairs[_pair_blocks(row_TK)](weights_TK, row_TK, weights_R, row_TK.numel(), PAIRS=_MOVED_PAIRS)
        return weights_R

    @staticmethod
    def backward(ctx: Any, grad_R: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (row_TK,) = ctx.saved_tensors
        grad_R = grad_R.contiguous()
        grad_TK = grad_R.new_empty(row_TK.shape)
        _gather_pairs[_pair_blocks(row_TK)](grad_R, row_TK, grad_TK, row_TK.numel(), PAIRS=_MOVED_PAIRS)
        return grad_TK, None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: torch.Tensor, row_TK: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(row_TK)
        ctx.num_rows = rows_RD.shape[0]
        return _sum_rows(rows_RD, row_TK)

    @staticmethod
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor, None]:
        (row_TK,) = ctx.saved_tensors
        return _copy_to_rows(grad_TD, row_TK, ctx.num_rows), None


def _copy_to_rows(x_TD: torch.Tensor, row_TK: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Each token in all its rows ``[R, D]``."""
    x_TD = dense_rows(x_TD)
    rows_RD = x_TD.new_empty(num_rows, x_TD.shape[1])
    _spread[(x_TD.shape[0],)](x_TD, row_TK, rows_RD, x_TD.stride(0), **_row_sizes(x_TD, row_TK))
    return rows_RD


def _sum_rows(rows_RD: torch.Tensor, row_TK: torch.Tensor) -> torch.Tensor:
    """Sum of each token's rows ``[T, D]``."""
    rows_RD = dense_rows(rows_RD)
    sums_TD = rows_RD.new_empty(row_TK.shape[0], rows_RD.shape[1])
    _gather[(row_TK.shape[0],)](rows_RD, row_TK, sums_TD, rows_RD.stride(0), **_row_sizes(rows_RD, row_TK))
    return sums_TD


def _pair_blocks(row_TK: torch.Tensor) -> tuple[int]:
    """Grid of the kernels that move one number a pair."""
    return (ceil_div(row_TK.numel(), _MOVED_PAIRS),)


def _row_sizes(x: torch.Tensor, row_TK: torch.Tensor) -> dict[str, int]:
    """Compile-time sizes of the kernels that move rows: a program holds one row of D elements."""
    hidden = x.shape[1]
    block = next_power_of_2(hidden)
    return {"HIDDEN": hidden, "TOP_K": row_TK.shape[1], "BLOCK": block, "num_warps": row_warps(block)}


@triton.jit
def _count(ids, counts, num_pairs, num_experts, PAIRS: tl.constexpr, EXPERTS: tl.constexpr):
    """Occurrences of each expert in this program's block of pairs."""
    block = tl.program_id(0).to(tl.int64)
    pair = block * PAIRS + tl.arange(0, PAIRS)
    expert_of_pair = tl.load(ids + pair, mask=pair < num_pairs, other=-1).to(tl.int32)
    for first in range(0, num_experts, EXPERTS):
        expert = first + tl.arange(0, EXPERTS)
        count = tl.sum((expert_of_pair[:, None] == expert[None, :]).to(tl.int32), axis=0)
        tl.store(counts + block * num_experts + expert, count, mask=expert < num_experts)


@triton.jit
def _scan(counts, totals, num_blocks, num_experts, BLOCKS: tl.constexpr, EXPERTS: tl.constexpr):
    """Replace each block's counts by the sum over the blocks before it; the sum over all of them to ``totals``."""
    expert = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    total = tl.zeros([EXPERTS], dtype=tl.int32)
    for first in range(0, num_blocks, BLOCKS):
        block = (first + tl.arange(0, BLOCKS)).to(tl.int64)
        place = counts + block[:, None] * num_experts + expert[None, :]
        mask = (block < num_blocks)[:, None] & (expert < num_experts)[None, :]
        count = tl.load(place, mask=mask, other=0)
        tl.store(place, tl.cumsum(count, axis=0) - count + total[None, :], mask=mask)
        total += tl.sum(count, axis=0)
    tl.store(totals + expert, total.to(tl.int64), mask=expert < num_experts)


@triton.jit
def _place(
    ids,
    before,
    totals,
    rows,
    tokens,
    num_pairs,
    num_experts,
    num_rows,
    TOP_K: tl.constexpr,
    PAIRS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Row of each pair of this program's block, and the token of each of these rows."""
    block = tl.program_id(0).to(tl.int64)
    within = tl.arange(0, PAIRS)
    pair = block * PAIRS + within
    mine = tl.load(ids + pair, mask=pair < num_pairs, other=-1).to(tl.int32)
    # The same values along the other axis, loaded because that is cheaper than transposing.
    other = tl.load(ids + block * PAIRS + within, mask=pair < num_pairs, other=-1).to(tl.int32)
    earlier = (other[None, :] == mine[:, None]) & (within[None, :] < within[:, None])
    row = tl.sum(earlier.to(tl.int32), axis=1)
    for first in range(0, num_experts, EXPERTS):
        expert = first + tl.arange(0, EXPERTS)
        total = tl.load(totals + expert, mask=expert < num_experts, other=0).to(tl.int32)
        row += tl.sum(tl.where(expert[None, :] < mine[:, None], total[None, :], 0), axis=1)
    has_row = mine >= 0
    row += tl.load(before + block * num_experts + mine, mask=has_row, other=0)
    has_row &= row < num_rows
    tl.store(rows + pair, tl.where(has_row, row, -1).to(tl.int64), mask=pair < num_pairs)
    tl.store(tokens + row, pair // TOP_K, mask=has_row)


@triton.jit
def _mask(column, HIDDEN: tl.constexpr, row):
    """Columns of a row that exists. Written with a block of rows, as a bound of 0 would hinder wide memory accesses."""
    return (column < HIDDEN) & (tl.zeros_like(column) + row >= 0)


@triton.jit
def _spread(x, row_of, rows, x_stride, HIDDEN: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """Copy one token to its rows."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    value = tl.load(x + token * x_stride + column, mask=column < HIDDEN, other=0)
    for k in tl.static_range(TOP_K):
        row = tl.load(row_of + token * TOP_K + k)
        tl.store(rows + row * HIDDEN + column, value, mask=_mask(column, HIDDEN, row))


@triton.jit
def _gather(rows, row_of, sums, row_stride, HIDDEN: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of one token's rows, in the order of k."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(row_of + token * TOP_K + k)
        total += tl.load(rows + row * row_stride + column, mask=_mask(column, HIDDEN, row), other=0).to(tl.float32)
    tl.store(sums + token * HIDDEN + column, total.to(sums.dtype.element_ty), mask=column < HIDDEN)


@triton.jit
def _scatter_pairs(values, row_of, out, num_pairs, PAIRS: tl.constexpr):
    """Each pair's value to its row."""
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    row = tl.load(row_of + pair, mask=pair < num_pairs, other=-1)
    tl.store(out + row, tl.load(values + pair, mask=row >= 0), mask=row >= 0)


@triton.jit
def _gather_pairs(values, row_of, out, num_pairs, PAIRS: tl.constexpr):
    """Each row's value to its pair, 0 to pairs without a row."""
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    row = tl.load(row_of + pair, mask=pair < num_pairs, other=-1)
    tl.store(out + pair, tl.load(values + row, mask=row >= 0, other=0), mask=pair < num_pairs)
