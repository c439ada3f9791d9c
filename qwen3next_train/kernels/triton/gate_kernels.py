"""Device code of the decays and write strengths of the delta rule, forward and backward, and of the norm's gate.

A program works on all heads of a block of tokens; on the norm's gate, on a block of (token, key head) pairs.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _softplus(x):
    """``log(1 + exp(x))``, as exact for small results as for large ones."""
    e = tl.exp(tl.minimum(x, 20.0))
    total = 1.0 + e
    # The logarithm of the rounded sum, corrected for what the sum has lost of e.
    small = tl.where(total == 1.0, e, tl.log(total) * (e / tl.where(total == 1.0, 1.0, total - 1.0)))
    return tl.where(x > 20.0, x, small)


@triton.jit(do_not_specialize=["num_tokens"])
def gates_kernel(
    ba,
    A_log,
    dt_bias,
    g,
    beta,
    num_tokens,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Log decay g and write strength beta."""
    tokens = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    inside = (tokens < num_tokens)[:, None] & (n < NUM_HEADS)[None, :]
    rate = tl.exp(tl.load(A_log + n, mask=n < NUM_HEADS, other=0.0).to(tl.float32))
    bias = tl.load(dt_bias + n, mask=n < NUM_HEADS, other=0.0).to(tl.float32)
    b_place = ba + tokens[:, None] * (2 * NUM_HEADS) + (n // GROUP * 2 * GROUP + n % GROUP)[None, :]
    b = tl.load(b_place, mask=inside, other=0.0).to(tl.float32)
    a = tl.load(b_place + GROUP, mask=inside, other=0.0).to(tl.float32)
    place = tokens[:, None] * NUM_HEADS + n[None, :]
    tl.store(g + place, -rate[None, :] * _softplus(a + bias[None, :]), mask=inside)
    tl.store(beta + place, tl.sigmoid(b), mask=inside)


@triton.jit(do_not_specialize=["num_tokens"])
def gates_backward_kernel(
    ba,
    A_log,
    dt_bias,
    dg,
    dbeta,
    dba,
    partial,
    num_tokens,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradients of the projection; of ``A_log`` and ``dt_bias`` this block's part."""
    tokens = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    inside = (tokens < num_tokens)[:, None] & (n < NUM_HEADS)[None, :]
    rate = tl.exp(tl.load(A_log + n, mask=n < NUM_HEADS, other=0.0).to(tl.float32))
    bias = tl.load(dt_bias + n, mask=n < NUM_HEADS, other=0.0).to(tl.float32)
    b_offset = tokens[:, None] * (2 * NUM_HEADS) + (n // GROUP * 2 * GROUP + n % GROUP)[None, :]
    b = tl.load(ba + b_offset, mask=inside, other=0.0).to(tl.float32)
    a = tl.load(ba + b_offset + GROUP, mask=inside, other=0.0).to(tl.float32)
    place = tokens[:, None] * NUM_HEADS + n[None, :]
    grad_g = tl.load(dg + place, mask=inside, other=0.0).to(tl.float32)
    grad_beta = tl.load(dbeta + place, mask=inside, other=0.0).to(tl.float32)
    strength = tl.sigmoid(b)
    x = a + bias[None, :]
    scaled = grad_g * -rate[None, :]
    grad_a = scaled * tl.sigmoid(x)
    tl.store(dba + b_offset, grad_beta * strength * (1.0 - strength), mask=inside)
    tl.store(dba + b_offset + GROUP, grad_a, mask=inside)
    sums = partial + tl.program_id(0) * (2 * NUM_HEADS) + n
    tl.store(sums, tl.sum(scaled * _softplus(x), 0), mask=n < NUM_HEADS)
    tl.store(sums + NUM_HEADS, tl.sum(grad_a, 0), mask=n < NUM_HEADS)


@triton.jit(do_not_specialize=["num_pairs"])
def place_gate_kernel(
    dz,
    dqkvz,
    num_pairs,
    SIZE: tl.constexpr,
    GROUP_COLUMNS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Each pair's gradient of z to the last columns of its part of the projection's gradient."""
    pair = (tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    inside = (pair < num_pairs) & (c < SIZE)
    value = tl.load(dz + pair * SIZE + c, mask=inside)
    tl.store(dqkvz + pair * GROUP_COLUMNS + (GROUP_COLUMNS - SIZE) + c, value, mask=inside)
