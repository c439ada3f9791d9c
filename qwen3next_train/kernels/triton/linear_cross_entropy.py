"""Head and cross entropy for CUDA: matrix products by cuBLAS, everything between them by one Triton kernel per chunk.

The kernel reads a row of logits twice, the second time from the cache for the most part, and leaves the logits'
gradient in their place. Gradients are produced in the forward pass and wait for the loss's own gradient, with which
they are multiplied when they are rounded to the parameters' dtype.

Saved for the backward pass: the gradients of the hidden states, in their dtype, and of the weight, in fp32.

Letters: T tokens, D hidden, V vocabulary, c tokens of a chunk.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl

from qwen3next_train.kernels.cross_entropy import IGNORE_INDEX
from qwen3next_train.kernels.main_grad import add_product, scaled_gradient
from qwen3next_train.kernels.triton.row_programs import ceil_div, next_power_of_2

_CHUNK_LOGITS = 5 * 2**28
"""Logits of a chunk, at most (8,800 tokens at 150k of them; 2.7 GB in bf16): every chunk after the first reads and
writes the fp32 sum of the weight's gradient, so few large ones are best."""

_LANES, _PER_LANE, _PIECES = 1024, 8, 2
"""A program's block of a row: as many running maxima and sums as threads, each over two 16-byte pieces of bf16."""


def linear_cross_entropy_triton(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_T: torch.Tensor,
    losses_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """A label outside of the vocabulary makes the loss not a number."""
    needs_grad = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad)
    return _LinearCrossEntropy.apply(hidden_TD, weight_VD, labels_T, needs_grad, _CHUNK_LOGITS, losses_T)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, labels_T, needs_grad, chunk_logits, losses_T):
        num_tokens, vocabulary = hidden_TD.shape[0], weight_VD.shape[0]
        if losses_T is None:
            losses_T = torch.empty(num_tokens, dtype=torch.float32, device=hidden_TD.device)
        grad_TD = torch.empty(hidden_TD.shape, dtype=hidden_TD.dtype, device=hidden_TD.device) if needs_grad else None
        grad_VD = torch.empty(weight_VD.shape, dtype=torch.float32, device=weight_VD.device) if needs_grad else None
        rows = _chunk_rows(num_tokens, vocabulary, chunk_logits)
        for start in range(0, num_tokens, rows):
            chunk = slice(start, start + rows)
            logits_cV = hidden_TD[chunk] @ weight_VD.t()
            _launch(logits_cV, labels_T[chunk], losses_T[chunk], with_gradient=needs_grad)
            if grad_TD is not None and grad_VD is not None:
                torch.mm(logits_cV, weight_VD, out=grad_TD[chunk])
                add_product(grad_VD, logits_cV.t(), hidden_TD[chunk], first=start == 0)
            del logits_cV
        if grad_VD is not None:
            ctx.save_for_backward(grad_TD, grad_VD if num_tokens else grad_VD.zero_())
            ctx.weight = weight_VD
        return losses_T.sum()

    @staticmethod
    def backward(ctx, grad):
        grad_TD, grad_VD = ctx.saved_tensors
        as_weight = functools.partial(_scaled, dtype=ctx.weight.dtype)
        grad_weight = scaled_gradient(ctx.weight, grad_VD, grad, as_weight)
        return _scaled(grad_TD, grad, grad_TD.dtype), grad_weight, None, None, None, None


def _chunk_rows(num_tokens: int, vocabulary: int, chunk_logits: int) -> int:
    """Rows of each chunk: as few chunks as fit, of equal size but for the last."""
    chunks = math.ceil(num_tokens * vocabulary / chunk_logits)
    return math.ceil(num_tokens / max(chunks, 1)) or 1


def _launch(logits_cV: torch.Tensor, labels_c: torch.Tensor, losses_c: torch.Tensor, *, with_gradient: bool) -> None:
    """Fill ``losses_c``, and put the gradient in the place of the logits."""
    vocabulary = logits_cV.shape[1]
    lanes = min(_LANES, next_power_of_2(ceil_div(vocabulary, _PER_LANE * _PIECES)))
    _cross_entropy[(logits_cV.shape[0],)](
        logits_cV,
        labels_c.contiguous(),
        losses_c,
        vocabulary,
        IGNORE=IGNORE_INDEX,
        LANES=lanes,
        PER_LANE=_PER_LANE,
        PIECES=_PIECES,
        WITH_GRADIENT=with_gradient,
        num_warps=max(1, lanes // 32),
    )


def _scaled(tensor: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Product with the scalar, unrounded until the end: as bf16, 1 / tokens would be off by up to 0.4 %."""
    out = torch.empty(tensor.shape, dtype=dtype, device=tensor.device)
    if out.numel():
        _scale[(ceil_div(out.numel(), 4096),)](tensor, factor, out, out.numel(), BLOCK=4096, num_warps=8)
    return out


@triton.jit
def _cross_entropy(
    logits_ptr,
    labels_ptr,
    losses_ptr,
    vocabulary,
    IGNORE: tl.constexpr,
    LANES: tl.constexpr,
    PER_LANE: tl.constexpr,
    PIECES: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
):
    """Loss of one row and, in its place, the gradient of the row: softmax minus one at the label, 0 if ignored."""
    row = tl.program_id(0).to(tl.int64)
    start = logits_ptr + row * vocabulary
    label = tl.load(labels_ptr + row)
    lane = (tl.arange(0, PIECES)[:, None] * LANES + tl.arange(0, LANES)[None, :]) * PER_LANE
    offset = lane[:, :, None] + tl.arange(0, PER_LANE)[None, None, :]
    if label == IGNORE:
        tl.store(losses_ptr + row, 0.0)
        if WITH_GRADIENT:
            zero = tl.zeros([PIECES, LANES, PER_LANE], dtype=tl.float32)
            for first in range(0, vocabulary, PIECES * LANES * PER_LANE):
                column = first + offset
                tl.store(start + column, zero.to(logits_ptr.dtype.element_ty), mask=column < vocabulary)
    else:
        # Finite, so that a lane that saw nothing yet rescales its empty sum by exp(0).
        largest = tl.full([LANES], -1e30, dtype=tl.float32)
        total = tl.zeros([LANES], dtype=tl.float32)
        for first in range(0, vocabulary, PIECES * LANES * PER_LANE):
            column = first + offset
            x = tl.load(start + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
            larger = tl.maximum(largest, tl.max(tl.max(x, axis=2), axis=0))
            terms = tl.exp(x - larger[None, :, None])
            total = total * tl.exp(largest - larger) + tl.sum(tl.sum(terms, axis=2), axis=0)
            largest = larger
        top = tl.max(largest, axis=0)
        log_sum = top + tl.log(tl.sum(total * tl.exp(largest - top), axis=0))
        # A label outside of the vocabulary makes the loss NaN, which stops a run.
        at_label = tl.load(start + label, mask=(label >= 0) & (label < vocabulary), other=float("nan"))
        tl.store(losses_ptr + row, log_sum - at_label.to(tl.float32))
        if WITH_GRADIENT:
            # Nobody may overwrite the label's logit before it is read.
            tl.debug_barrier()
            for first in range(0, vocabulary, PIECES * LANES * PER_LANE):
                column = first + offset
                x = tl.load(start + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
                gradient = tl.exp(x - log_sum) - tl.where(column == label, 1.0, 0.0)
                tl.store(start + column, gradient.to(logits_ptr.dtype.element_ty), mask=column < vocabulary)


@triton.jit
def _scale(source_ptr, factor_ptr, out_ptr, size, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    value = tl.load(source_ptr + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, value * tl.load(factor_ptr), mask=inside)
