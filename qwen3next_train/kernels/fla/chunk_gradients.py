"""Gradients inside the chunks of the gated delta rule, given the states between them (Triton).

The backward pass of the chunked rule (arXiv 2412.06464) has a part that runs along the chunks, and one that treats each
chunk by itself. The latter is here. A program takes a chunk of one key head and goes through the value heads that share
it, so that the gradients of q and k leave it summed, where FLA's kernels write one of each per value head and leave
the sums to torch.

With G the cumulated log decay of a chunk and D[i, j] = exp(G[i] - G[j]) for i >= j, for each value head:

    w = A (beta exp(G) k)    u = A (beta v)    v_new = u - w h    A = inverse(I + tril(beta k k^T * D, -1))
    o = scale (exp(G) q h + tril(q k^T * D) v_new)    next h = exp(G_end) h + (exp(G_end - G) k)^T v_new

The first kernel differentiates o, v_new and the next h, the second one w, u and A.

Letters: T tokens, M chunks, C tokens of a chunk, H key heads, N value heads, R = N / H, K key head dim, V value head
dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from qwen3next_train.kernels.triton.row_programs import next_power_of_2


class ChunkStates(NamedTuple):
    """What the pass along the chunks leaves behind.

    Args:
        v_new_TNV: values as written to the states ``[T, N, V]``.
        h_MNKV: state before each chunk ``[M, N, K, V]``.
        dv_new_TNV: gradient of ``v_new_TNV``.
        dh_MNKV: gradient of the state after each chunk.
    """

    v_new_TNV: torch.Tensor
    h_MNKV: torch.Tensor
    dv_new_TNV: torch.Tensor
    dh_MNKV: torch.Tensor


class ChunkInputs(NamedTuple):
    """What the rule's forward pass worked on, and its output's gradient; all contiguous.

    Args:
        q_THK: queries ``[T, H, K]``.
        k_THK: keys ``[T, H, K]``.
        v_TNV: values ``[T, N, V]``.
        G_TN: fp32 ``[T, N]``, log2 decays cumulated within each chunk.
        beta_TN: write strengths ``[T, N]``.
        A_TNC: rows of the inverse above ``[T, N, C]``.
        do_TNV: gradient of the rule's output.
        cu_seqlens: int32 ``[D + 1]``, document starts and T.
        chunk_indices: int32 ``[M, 2]``, document and index inside it of each chunk.
    """

    q_THK: torch.Tensor
    k_THK: torch.Tensor
    v_TNV: torch.Tensor
    G_TN: torch.Tensor
    beta_TN: torch.Tensor
    A_TNC: torch.Tensor
    do_TNV: torch.Tensor
    cu_seqlens: torch.Tensor
    chunk_indices: torch.Tensor


class OutputGradients(NamedTuple):
    """What the first kernel finds.

    Args:
        dq_THK: gradient of the queries, final.
        dk_THK: of the keys in fp32, but for what goes through w, u and A.
        dw_TNK: of w.
        dg_TN: of G in fp32, but for what goes through w, u and A.
    """

    dq_THK: torch.Tensor
    dk_THK: torch.Tensor
    dw_TNK: torch.Tensor
    dg_TN: torch.Tensor


class WriteGradients(NamedTuple):
    """What the second kernel finds: final gradients, those of g in fp32, the others in the operands' dtypes."""

    dk_THK: torch.Tensor
    dv_TNV: torch.Tensor
    dg_TN: torch.Tensor
    dbeta_TN: torch.Tensor


def output_gradients(inputs: ChunkInputs, states: ChunkStates) -> OutputGradients:
    """Differentiate o, v_new and the next h of each chunk."""
    q_THK, k_THK, v_TNV = inputs.q_THK, inputs.k_THK, inputs.v_TNV
    found = OutputGradients(
        torch.empty_like(q_THK),
        torch.empty(k_THK.shape, dtype=torch.float32, device=k_THK.device),
        k_THK.new_empty(*v_TNV.shape[:2], k_THK.shape[2]),
        torch.empty_like(inputs.G_TN),
    )
    _output_gradients[_grid(inputs)](
        q_THK,
        k_THK,
        inputs.G_TN,
        inputs.do_TNV,
        *states,
        *found,
        inputs.cu_seqlens,
        inputs.chunk_indices,
        k_THK.shape[2] ** -0.5,
        BLOCK_K=next_power_of_2(k_THK.shape[2]),
        **_sizes(inputs, _OUTPUT_LAUNCH),
    )
    return found


def write_gradients(inputs: ChunkInputs, states: ChunkStates, outputs: OutputGradients) -> WriteGradients:
    """Differentiate w, u and A of each chunk, and put the parts together; ``outputs`` is used up."""
    k_THK = inputs.k_THK
    found = WriteGradients(
        torch.empty_like(k_THK), torch.empty_like(inputs.v_TNV), outputs.dg_TN, torch.empty_like(inputs.beta_TN)
    )
    _write_gradients[_grid(inputs)](
        k_THK,
        inputs.v_TNV,
        inputs.G_TN,
        inputs.beta_TN,
        inputs.A_TNC,
        outputs.dw_TNK,
        states.dv_new_TNV,
        outputs.dk_THK,
        *found,
        inputs.cu_seqlens,
        inputs.chunk_indices,
        BLOCK_K=min(_WRITE_LAUNCH.block, next_power_of_2(k_THK.shape[2])),
        **_sizes(inputs, _WRITE_LAUNCH),
    )
    return found


class _Launch(NamedTuple):
    """How a kernel is launched: columns at a time, warps of a program, stages of its loops' loads."""

    block: int
    num_warps: int
    num_stages: int


# The fastest of those tried on an H200 with heads of 128; the first takes 174 KB of the 227 KB of shared memory there.
_OUTPUT_LAUNCH = _Launch(64, 8, 3)
_WRITE_LAUNCH = _Launch(64, 4, 1)


def _grid(inputs: ChunkInputs) -> tuple[int, int]:
    """A program for each chunk and key head."""
    return inputs.chunk_indices.shape[0], inputs.k_THK.shape[1]


def _sizes(inputs: ChunkInputs, launch: _Launch) -> dict[str, int]:
    """Compile-time sizes that the kernels share."""
    (_, key_heads, key_dim), (_, value_heads, value_dim) = inputs.k_THK.shape, inputs.v_TNV.shape
    return {
        "H": key_heads,
        "R": value_heads // key_heads,
        "K": key_dim,
        "V": value_dim,
        "C": inputs.A_TNC.shape[-1],
        "BLOCK_V": min(launch.block, next_power_of_2(value_dim)),
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }


@triton.jit
def _chunk(cu_seqlens, chunk_indices, C: tl.constexpr):
    """First token of this program's chunk, and how many there are."""
    chunk = tl.program_id(0)
    document = tl.load(chunk_indices + 2 * chunk)
    start = tl.load(cu_seqlens + document) + tl.load(chunk_indices + 2 * chunk + 1) * C
    return start.to(tl.int64), tl.minimum(tl.load(cu_seqlens + document + 1) - start, C)


@triton.jit
def _output_gradients(
    q,
    k,
    G,
    do,
    v_new,
    h,
    dv_new,
    dh,
    dq,
    dk_sum,
    dw,
    dg,
    cu_seqlens,
    chunk_indices,
    scale,
    H: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Gradients of q, and of k and g as far as they do not go through w, u and A; that of w."""
    start, length = _chunk(cu_seqlens, chunk_indices, C)
    head = tl.program_id(1)
    slot = tl.arange(0, C)
    column_k, column_v = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    exists = slot < length
    inside_k = exists[:, None] & (column_k < K)[None, :]
    seen = (slot[:, None] >= slot[None, :]) & exists[:, None] & exists[None, :]
    # Offsets of rows are counted from the chunk's first token, in 32 bits.
    base_k = (start * H + head) * K
    place = slot[:, None] * (H * K) + column_k[None, :]
    q_CK = tl.load(q + base_k + place, mask=inside_k, other=0.0)
    k_CK = tl.load(k + base_k + place, mask=inside_k, other=0.0)
    total_dq = tl.zeros([C, BLOCK_K], dtype=tl.float32)
    total_dk = tl.zeros([C, BLOCK_K], dtype=tl.float32)
    # Not unrolled, which spills more registers. Where one block holds all of V this is the innermost loop, whose loads
    # would be staged in three times the shared memory.
    for r in tl.range(0, R, num_stages=1):
        base = start * (H * R) + head * R + r
        base_state = (tl.program_id(0).to(tl.int64) * (H * R) + head * R + r) * (K * V)
        dq_CK = tl.zeros([C, BLOCK_K], dtype=tl.float32)
        dk_CK = tl.zeros([C, BLOCK_K], dtype=tl.float32)
        dw_CK = tl.zeros([C, BLOCK_K], dtype=tl.float32)
        ds_CC = tl.zeros([C, C], dtype=tl.float32)
        product = tl.zeros([BLOCK_V], dtype=tl.float32)
        for first in range(0, V, BLOCK_V):
            v = first + column_v
            inside_v = exists[:, None] & (v < V)[None, :]
            inside_state = (v < V)[:, None] & (column_k < K)[None, :]
            value = slot[:, None] * (H * R * V) + v[None, :]
            state = v[:, None] + column_k[None, :] * V
            v_CV = tl.load(v_new + base * V + value, mask=inside_v, other=0.0)
            do_CV = tl.load(do + base * V + value, mask=inside_v, other=0.0)
            dv_CV = tl.load(dv_new + base * V + value, mask=inside_v, other=0.0)
            h_VK = tl.load(h + base_state + state, mask=inside_state, other=0.0)
            dh_VK = tl.load(dh + base_state + state, mask=inside_state, other=0.0)
            product += tl.sum(h_VK.to(tl.float32) * dh_VK.to(tl.float32), axis=1)
            ds_CC = tl.dot(do_CV, tl.trans(v_CV), ds_CC)
            dq_CK = tl.dot(do_CV, h_VK.to(do_CV.dtype), dq_CK)
            dk_CK = tl.dot(v_CV, dh_VK.to(v_CV.dtype), dk_CK)
            dw_CK = tl.dot(dv_CV, h_VK.to(dv_CV.dtype), dw_CK)
        wide = slot[:, None] * (H * R * K) + column_k[None, :]
        tl.store(dw + base * K + wide, (-dw_CK).to(dw.dtype.element_ty), mask=inside_k)
        row = slot * (H * R)
        G_C = tl.load(G + base + row, mask=exists, other=0.0)
        G_end = tl.load(G + base + (length - 1) * (H * R))
        dq_CK = dq_CK * (tl.exp2(G_C) * scale)[:, None]
        dk_CK = dk_CK * tl.where(exists, tl.exp2(G_end - G_C), 0.0)[:, None]
        dg_end = tl.exp2(G_end) * tl.sum(product, axis=0) + tl.sum(dk_CK * k_CK)
        ds_CC = tl.where(seen, ds_CC * tl.exp2(G_C[:, None] - G_C[None, :]), 0.0) * scale
        ds_narrow = ds_CC.to(k_CK.dtype)
        dq_CK = tl.dot(ds_narrow, k_CK, dq_CK)
        dk_CK = tl.dot(tl.trans(ds_narrow), q_CK, dk_CK)
        dg_C = tl.sum(dq_CK * q_CK, axis=1) - tl.sum(dk_CK * k_CK, axis=1)
        dg_C += tl.where(slot == length - 1, dg_end, 0.0)
        tl.store(dg + base + row, dg_C, mask=exists)
        total_dq += dq_CK
        total_dk += dk_CK
    tl.store(dq + base_k + place, total_dq.to(dq.dtype.element_ty), mask=inside_k)
    tl.store(dk_sum + base_k + place, total_dk, mask=inside_k)


@triton.jit
def _products_of_keys(k, exists, H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr):
    """``k k^T`` of a chunk whose first row of keys is at ``k``."""
    slot, column_k = tl.arange(0, C), tl.arange(0, BLOCK_K)
    products_CC = tl.zeros([C, C], dtype=tl.float32)
    for first in range(0, K, BLOCK_K):
        column = first + column_k
        inside = exists[:, None] & (column < K)[None, :]
        k_CK = tl.load(k + slot[:, None] * (H * K) + column[None, :], mask=inside, other=0.0)
        products_CC = tl.dot(k_CK, tl.trans(k_CK), products_CC)
    return products_CC


@triton.jit
def _write_gradients(
    k,
    v,
    G,
    beta,
    A,
    dw,
    du,
    dk_sum,
    dk,
    dv,
    dg,
    dbeta,
    cu_seqlens,
    chunk_indices,
    H: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Gradients of v and beta; what w, u and A add to those of k and g, the latter summed up from a chunk's end."""
    start, length = _chunk(cu_seqlens, chunk_indices, C)
    head = tl.program_id(1)
    slot = tl.arange(0, C)
    column_k, column_v = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    exists = slot < length
    earlier = (slot[:, None] > slot[None, :]) & exists[:, None] & exists[None, :]
    base_k = (start * H + head) * K
    narrow = k.dtype.element_ty
    for r in range(R):
        base = start * (H * R) + head * R + r
        row = slot * (H * R)
        G_C = tl.load(G + base + row, mask=exists, other=0.0)
        growth_C = tl.exp2(G_C)
        beta_C = tl.load(beta + base + row, mask=exists, other=0.0).to(tl.float32)
        # Transposed: row j holds what token j contributes to each token of the chunk.
        inverse = row[None, :] * C + slot[:, None]
        At_CC = tl.load(A + base * C + inverse, mask=exists[None, :], other=0.0)
        dA_CC = tl.zeros([C, C], dtype=tl.float32)
        for first in range(0, K, BLOCK_K):
            column = first + column_k
            inside = exists[:, None] & (column < K)[None, :]
            k_CK = tl.load(k + base_k + slot[:, None] * (H * K) + column[None, :], mask=inside, other=0.0)
            dw_CK = tl.load(dw + base * K + row[:, None] * K + column[None, :], mask=inside, other=0.0)
            dA_CC = tl.dot(dw_CK, tl.trans((k_CK * (beta_C * growth_C)[:, None]).to(narrow)), dA_CC)
        dbeta_C = tl.zeros([C], dtype=tl.float32)
        for first in range(0, V, BLOCK_V):
            column = first + column_v
            inside = exists[:, None] & (column < V)[None, :]
            value = base * V + row[:, None] * V + column[None, :]
            v_CV = tl.load(v + value, mask=inside, other=0.0)
            du_CV = tl.load(du + value, mask=inside, other=0.0)
            dA_CC = tl.dot(du_CV, tl.trans((v_CV * beta_C[:, None]).to(narrow)), dA_CC)
            written_CV = tl.dot(At_CC, du_CV)
            dbeta_C += tl.sum(written_CV * v_CV, axis=1)
            tl.store(dv + value, (written_CV * beta_C[:, None]).to(dv.dtype.element_ty), mask=inside)
        # Through the inverse, then to the strictly lower triangle of beta k k^T * D.
        dA_CC = tl.where(earlier, dA_CC, 0.0)
        dA_CC = tl.dot(dA_CC.to(narrow), At_CC)
        dA_CC = tl.dot(At_CC, dA_CC.to(narrow))
        dA_CC = tl.where(earlier, -dA_CC * tl.exp2(G_C[:, None] - G_C[None, :]), 0.0)
        dA_narrow = dA_CC.to(narrow)
        # Not in the loop below, so that its sum is gone from the registers when those of that loop come.
        exchange_CC = dA_CC * _products_of_keys(k + base_k, exists, H, K, C, BLOCK_K) * beta_C[:, None]
        dg_C = tl.load(dg + base + row, mask=exists, other=0.0)
        dg_C += tl.sum(exchange_CC, axis=1) - tl.sum(exchange_CC, axis=0)
        gain_C = tl.zeros([C], dtype=tl.float32)
        # What the head before has stored is read by other threads.
        tl.debug_barrier()
        for first in range(0, K, BLOCK_K):
            column = first + column_k
            inside = exists[:, None] & (column < K)[None, :]
            place = base_k + slot[:, None] * (H * K) + column[None, :]
            k_CK = tl.load(k + place, mask=inside, other=0.0)
            dw_CK = tl.load(dw + base * K + row[:, None] * K + column[None, :], mask=inside, other=0.0)
            written_CK = tl.dot(At_CC, dw_CK)
            gain_C += tl.sum(written_CK * k_CK, axis=1)
            through_CK = tl.dot(dA_narrow, k_CK)
            dbeta_C += tl.sum(through_CK * k_CK, axis=1)
            dk_CK = (written_CK * growth_C[:, None] + through_CK) * beta_C[:, None]
            dk_CK = tl.dot(tl.trans(dA_narrow), (k_CK * beta_C[:, None]).to(narrow), dk_CK)
            dk_CK += tl.load(dk_sum + place, mask=inside, other=0.0)
            if r == R - 1:
                tl.store(dk + place, dk_CK.to(dk.dtype.element_ty), mask=inside)
            else:
                tl.store(dk_sum + place, dk_CK, mask=inside)
        gain_C *= growth_C
        dg_C += gain_C * beta_C
        # g of a token decays all that follows in its chunk.
        later_CC = (slot[:, None] <= slot[None, :]).to(tl.float32)
        tl.store(dg + base + row, tl.sum(later_CC * dg_C[None, :], axis=1), mask=exists)
        tl.store(dbeta + base + row, (dbeta_C + gain_C).to(dbeta.dtype.element_ty), mask=exists)
