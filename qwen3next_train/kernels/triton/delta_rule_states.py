"""What a slice does to the state of the gated delta rule, and the gradient of that state, along chunks, in Triton.

Within a chunk of tokens the rule has been solved for ``w`` and ``u`` (Yang et al., arXiv 2412.06464, section 3.3). With
g the log decays summed from the chunk's beginning and g_C their sum, a chunk makes of a state S

    ``exp(g_C) S + (exp(g_C - g) k)^T (u - w S)``

It is linear in S, so what a row of chunks does is ``S_end = M S_begin + S_0``. Columns of ``[S_0 | M]`` do not depend
on each other: those of S_0 begin at zero, those of M at the identity and with u = 0. The gradient of the state at the
beginning obeys the transposed chain from the end.

A program goes over the chunks of one segment for a block of columns. A state is kept in fp32 and rounded to the
operands' dtype for products, as in the rule itself. Transitions are multiplied with each other by the thousands, so
theirs are split products: bf16 operands are the sum of two, exact to 16 bits.

Letters: T tokens, D documents, S segments of each, H key heads, N value heads, K key head dim, V value head dim,
X = V + K columns of a state and a transition.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwen3next_train.kernels.triton.row_programs import ceil_div, next_power_of_2

MAX_JOINED_KEY_DIM = 128
"""Largest key head dim of segments that :func:`joined` joins: a whole transition in fp32 lies in shared memory, 64 KB.

One of 256 would take 256 KB, which no GPU has.
"""
_COLUMNS = 64
_GRADIENT_COLUMNS = 32
"""Fewer: documents are not cut into segments there, and columns are all that runs side by side."""


def sum_up_segments(
    k_THK: torch.Tensor,
    w_TNK: torch.Tensor,
    u_TNV: torch.Tensor,
    g_TN: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    chunk: int,
) -> torch.Tensor:
    """``[S_0 | M]`` of each segment, fp32 ``[segments, N, K, X]``.

    Args:
        k_THK: keys.
        w_TNK: of each chunk.
        u_TNV: of each chunk.
        g_TN: log2 of the decay from the beginning of each token's chunk on, fp32.
        cu_seqlens: where segments begin, int32 ``[segments + 1]``; at a chunk's beginning each.
        chunk: tokens.
    """
    (_, heads, key_dim), (_, value_heads, value_dim) = k_THK.shape, u_TNV.shape
    segments = cu_seqlens.numel() - 1
    parts_NKX = k_THK.new_empty(segments, value_heads, key_dim, value_dim + key_dim, dtype=torch.float32)
    _sum_up[(_column_blocks(key_dim, value_dim), value_heads, segments)](
        k_THK,
        w_TNK,
        u_TNV,
        g_TN,
        cu_seqlens,
        parts_NKX,
        heads,
        value_heads,
        K=key_dim,
        V=value_dim,
        BLOCK_K=_key_block(key_dim),
        COLUMNS=_COLUMNS,
        CHUNK=chunk,
        num_warps=4 if key_dim <= 128 else 8,
        num_stages=2 if key_dim <= 128 else 1,
    )
    return parts_NKX


def joined(parts_DSNKX: torch.Tensor, *, value_dim: int) -> torch.Tensor:
    """States and transitions of whole documents ``[D, N, K, X]``, of those of their segments, all fp32.

    Of two in a row the state is ``M' S + S'`` and the transition ``M' M``.

    Args:
        parts_DSNKX: ``[S_0 | M]`` of each segment; of more than one K is at most :data:`MAX_JOINED_KEY_DIM`.
        value_dim: V.
    """
    documents, segments, value_heads, key_dim, _ = parts_DSNKX.shape
    if segments == 1:
        return parts_DSNKX.squeeze(1)
    result_DNKX = torch.empty_like(parts_DSNKX[:, 0])
    _join[(_column_blocks(key_dim, value_dim), value_heads, documents)](
        parts_DSNKX,
        result_DNKX,
        segments,
        value_heads,
        K=key_dim,
        V=value_dim,
        BLOCK_K=_key_block(key_dim),
        COLUMNS=_COLUMNS,
        num_warps=8,
        num_stages=1,
    )
    return result_DNKX


def state_gradient(
    q_THK: torch.Tensor,
    k_THK: torch.Tensor,
    w_TNK: torch.Tensor,
    grad_TNV: torch.Tensor,
    grad_writes_TNV: torch.Tensor,
    g_TN: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    chunk: int,
) -> torch.Tensor:
    """Gradient of the state at each document's beginning by its outputs, fp32 ``[D, N, K, V]``.

    Args:
        q_THK: queries; the rule scales them by ``K ** -0.5``.
        k_THK: keys.
        w_TNK: of each chunk.
        grad_TNV: of the outputs.
        grad_writes_TNV: gradient of ``u - w S`` by the outputs of the same chunk.
        g_TN: as of :func:`sum_up_segments`.
        cu_seqlens: where documents begin, int32 ``[D + 1]``.
        chunk: tokens.
    """
    (_, heads, key_dim), (_, value_heads, value_dim) = k_THK.shape, grad_TNV.shape
    documents = cu_seqlens.numel() - 1
    gradient_DNKV = k_THK.new_empty(documents, value_heads, key_dim, value_dim, dtype=torch.float32)
    _state_gradient[(ceil_div(value_dim, _GRADIENT_COLUMNS), value_heads, documents)](
        q_THK,
        k_THK,
        w_TNK,
        grad_TNV,
        grad_writes_TNV,
        g_TN,
        cu_seqlens,
        gradient_DNKV,
        key_dim**-0.5,
        heads,
        value_heads,
        K=key_dim,
        V=value_dim,
        BLOCK_K=_key_block(key_dim),
        COLUMNS=_GRADIENT_COLUMNS,
        CHUNK=chunk,
        num_warps=4,
        num_stages=3 if key_dim <= 128 else 1,
    )
    return gradient_DNKV


def _key_block(key_dim: int) -> int:
    """Rows of a state; tensor cores take 16 at least."""
    return max(16, next_power_of_2(key_dim))


def _column_blocks(key_dim: int, value_dim: int) -> int:
    """How many programs the columns of a state and a transition take (:func:`_columns_of`)."""
    return ceil_div(value_dim, _COLUMNS) + ceil_div(key_dim, _COLUMNS)


@triton.jit
def _columns_of(block, K: tl.constexpr, V: tl.constexpr, COLUMNS: tl.constexpr):
    """Whether a block is one of states, its columns among those of its kind, how many there are, where they lie in X.

    Both kinds begin with a block of their own.
    """
    state_blocks = tl.cdiv(V, COLUMNS)
    is_state = block < state_blocks
    column = tl.where(is_state, block, block - state_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    return is_state, column, tl.where(is_state, V, K), tl.where(is_state, 0, V)


@triton.jit
def _rounded_product(left, right, total):
    """``total + left @ right``, right rounded to left's dtype."""
    return tl.dot(left, right.to(left.dtype), total, input_precision="ieee")


@triton.jit
def _split_product(left, right, total):
    """The same without rounding: of bf16 the sum of two products, exact to 16 bits."""
    high = right.to(left.dtype)
    total = tl.dot(left, high, total, input_precision="ieee")
    if left.dtype != tl.float32:
        total = tl.dot(left, (right - high.to(tl.float32)).to(left.dtype), total)
    return total


@triton.jit
def _decays(g, token, last, value_heads, inside):
    """From each token to the chunk's end, and over the whole chunk."""
    of_all = tl.load(g + last.to(tl.int64) * value_heads)
    since = tl.load(g + token * value_heads, mask=inside, other=0.0)
    return tl.where(inside, tl.exp2(of_all - since), 0.0), tl.exp2(of_all)


@triton.jit
def _chain(
    total,
    k,
    w,
    u,
    g,
    start,
    end,
    column,
    heads,
    value_heads,
    IS_STATE: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """What all chunks of a segment make of a block of columns."""
    row = tl.arange(0, BLOCK_K)
    for first in range(start, end, CHUNK):
        token_C = (first + tl.arange(0, CHUNK)).to(tl.int64)
        inside_C = token_C < end
        mask_CK = inside_C[:, None] & (row < K)[None, :]
        w_CK = tl.load(w + token_C[:, None] * (value_heads * K) + row[None, :], mask=mask_CK, other=0.0)
        k_CK = tl.load(k + token_C[:, None] * (heads * K) + row[None, :], mask=mask_CK, other=0.0)
        decay_C, decay = _decays(g, token_C, tl.minimum(first + CHUNK, end) - 1, value_heads, inside_C)
        read_CX = tl.zeros([CHUNK, COLUMNS], dtype=tl.float32)
        if IS_STATE:
            read_CX = _rounded_product(w_CK, total, read_CX)
            u_place = u + token_C[:, None] * (value_heads * V) + column[None, :]
            u_CX = tl.load(u_place, mask=inside_C[:, None] & (column < V)[None, :], other=0.0).to(tl.float32)
            total = _rounded_product(tl.trans(k_CK), (u_CX - read_CX) * decay_C[:, None], total * decay)
        else:
            read_CX = _split_product(w_CK, total, read_CX)
            total = _split_product(tl.trans(k_CK), -read_CX * decay_C[:, None], total * decay)
    return total


@triton.jit
def _sum_up(
    k,
    w,
    u,
    g,
    cu_seqlens,
    parts,
    heads,
    value_heads,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """``[S_0 | M]`` of a segment and head, a block of its columns."""
    head, segment = tl.program_id(1), tl.program_id(2)
    is_state, column, size, offset = _columns_of(tl.program_id(0), K, V, COLUMNS)
    start, end = tl.load(cu_seqlens + segment), tl.load(cu_seqlens + segment + 1)
    k += head // (value_heads // heads) * K
    w += head * K
    u += head * V
    g += head
    row = tl.arange(0, BLOCK_K)
    if is_state:
        total = tl.zeros([BLOCK_K, COLUMNS], dtype=tl.float32)
        total = _chain(total, k, w, u, g, start, end, column, heads, value_heads, True, K, V, BLOCK_K, COLUMNS, CHUNK)
    else:
        total = tl.where(row[:, None] == column[None, :], 1.0, 0.0)
        total = _chain(total, k, w, u, g, start, end, column, heads, value_heads, False, K, V, BLOCK_K, COLUMNS, CHUNK)
    place = parts + (segment.to(tl.int64) * value_heads + head) * (K * (K + V))
    place += row[:, None] * (K + V) + (offset + column)[None, :]
    tl.store(place, total, mask=(row < K)[:, None] & (column < size)[None, :])


@triton.jit
def _join(
    parts,
    result,
    segments,
    value_heads,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One segment after the other, a block of columns of a document and head."""
    head, document = tl.program_id(1), tl.program_id(2).to(tl.int64)
    is_state, column, size, offset = _columns_of(tl.program_id(0), K, V, COLUMNS)
    row = tl.arange(0, BLOCK_K)
    mask_KX = (row < K)[:, None] & (column < size)[None, :]
    place_KX = row[:, None] * (K + V) + (offset + column)[None, :]
    place_KK = row[:, None] * (K + V) + V + row[None, :]
    mask_KK = (row < K)[:, None] & (row < K)[None, :]
    part = parts + (document * segments * value_heads + head) * (K * (K + V))
    total = tl.load(part + place_KX, mask=mask_KX, other=0.0)
    for _ in range(1, segments):
        part += value_heads * (K * (K + V))
        transition_KK = tl.load(part + place_KK, mask=mask_KK, other=0.0)
        own_KX = tl.load(part + place_KX, mask=mask_KX & is_state, other=0.0)
        total = tl.dot(transition_KK, total, own_KX, input_precision="tf32x3")
    tl.store(result + (document * value_heads + head) * (K * (K + V)) + place_KX, total, mask=mask_KX)


@triton.jit
def _state_gradient(
    q,
    k,
    w,
    grad,
    grad_writes,
    g,
    cu_seqlens,
    result,
    scale,
    heads,
    value_heads,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """From the last chunk of a document to the first, a block of columns of a head."""
    head, document = tl.program_id(1), tl.program_id(2)
    column, row = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, BLOCK_K)
    start, end = tl.load(cu_seqlens + document), tl.load(cu_seqlens + document + 1)
    key_head = head // (value_heads // heads)
    total = tl.zeros([BLOCK_K, COLUMNS], dtype=tl.float32)
    chunks = tl.cdiv(end - start, CHUNK)
    for number in range(chunks):
        first = start + (chunks - 1 - number) * CHUNK
        token_C = (first + tl.arange(0, CHUNK)).to(tl.int64)
        inside_C = token_C < end
        mask_CK = inside_C[:, None] & (row < K)[None, :]
        mask_CX = inside_C[:, None] & (column < V)[None, :]
        key_place = (token_C[:, None] * heads + key_head) * K + row[None, :]
        value_place = (token_C[:, None] * value_heads + head) * V + column[None, :]
        k_CK = tl.load(k + key_place, mask=mask_CK, other=0.0)
        q_CK = tl.load(q + key_place, mask=mask_CK, other=0.0)
        w_CK = tl.load(w + (token_C[:, None] * value_heads + head) * K + row[None, :], mask=mask_CK, other=0.0)
        do_CX = tl.load(grad + value_place, mask=mask_CX, other=0.0)
        writes_CX = tl.load(grad_writes + value_place, mask=mask_CX, other=0.0).to(tl.float32)
        decay_C, decay = _decays(g + head, token_C, tl.minimum(first + CHUNK, end) - 1, value_heads, inside_C)
        since_C = tl.exp2(tl.load(g + token_C * value_heads + head, mask=inside_C, other=0.0))
        writes_CX += _rounded_product(k_CK, total, tl.zeros([CHUNK, COLUMNS], dtype=tl.float32)) * decay_C[:, None]
        reads_CX = do_CX.to(tl.float32) * (since_C * scale)[:, None]
        total = _rounded_product(tl.trans(q_CK), reads_CX, total * decay)
        total = _rounded_product(tl.trans(w_CK), -writes_CX, total)
    place = result + (document.to(tl.int64) * value_heads + head) * (K * V) + row[:, None] * V + column[None, :]
    tl.store(place, total, mask=(row < K)[:, None] & (column < V)[None, :])
