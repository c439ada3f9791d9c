"""What passes the state of the gated delta rule, by flash-linear-attention's Triton kernels (CUDA only).

A program for a block of columns goes over chunks one after the other: forward for the summary, from the end for the
gradient of the state at the beginning. For the summary a document is cut into segments, which are summed up side by
side and joined. Transitions are multiplied up in fp32.

Letters: T tokens, D documents, S segments of each, H key heads, N value heads, K key head dim, V value head dim,
X = V + K columns of a state and a transition.
"""

from __future__ import annotations

from typing import Any

import torch
from fla.ops.common.chunk_o import chunk_bwd_dv_local
from fla.ops.cp.chunk_bwd import chunk_cp_bwd_kernel_dh
from fla.ops.cp.chunk_fwd import chunk_cp_fwd_h
from fla.ops.gated_delta_rule.chunk_fwd import chunk_gated_delta_rule_fwd_intra
from fla.ops.utils import chunk_local_cumsum
from fla.ops.utils.constant import RCP_LN2

from qwen3next_train.kernels.fla.gated_delta_rule import CHUNK_SIZE
from qwen3next_train.kernels.triton.row_programs import ceil_div, next_power_of_2
from qwen3next_train.kernels.varlen import VarlenMetadata

NUM_SEGMENTS = 16
"""Of a micro-batch: each is a chain of chunks, and one for each document would leave most of a large GPU waiting."""


def delta_rule_summary_fla(
    k_THK: torch.Tensor,
    v_TNV: torch.Tensor,
    *,
    g_TN: torch.Tensor,
    beta_TN: torch.Tensor,
    sequences: VarlenMetadata,
) -> torch.Tensor:
    """fp32; inputs that are not contiguous are copied."""
    k, v, g, beta = _batch_of_one(k_THK, v_TNV, g_TN, beta_TN)
    chunks = _chunks(sequences)
    G = chunk_local_cumsum(g, scale=RCP_LN2, **chunks)
    w, u, _ = chunk_gated_delta_rule_fwd_intra(k=k, v=v, g=G, beta=beta, **chunks)
    count = _num_segments(sequences)
    parts_NKX = _states(k, v, sequences.num_documents * count)
    chunk_cp_fwd_h(
        k=k,
        w=w,
        u=u,
        hm=parts_NKX,
        g=G,
        cu_seqlens=sequences.derived(("segments", count), lambda: _segments(sequences, count)),
        chunk_size=CHUNK_SIZE,
        multi_seqs=True,
    )
    return joined(parts_NKX.unflatten(0, (-1, count)), value_dim=v.shape[3])


def delta_state_gradient_fla(
    q_THK: torch.Tensor,
    k_THK: torch.Tensor,
    grad_TNV: torch.Tensor,
    *,
    g_TN: torch.Tensor,
    beta_TN: torch.Tensor,
    sequences: VarlenMetadata,
) -> torch.Tensor:
    """fp32; inputs that are not contiguous are copied. One launch for each document."""
    q, k, grad, g, beta = _batch_of_one(q_THK, k_THK, grad_TNV, g_TN, beta_TN)
    chunks = _chunks(sequences)
    scale = k.shape[-1] ** -0.5
    G = chunk_local_cumsum(g, scale=RCP_LN2, **chunks)
    # Of w and u only w is read: any values do.
    w, _, _ = chunk_gated_delta_rule_fwd_intra(k=k, v=grad, g=G, beta=beta, **chunks)
    dv = chunk_bwd_dv_local(q=q, k=k, g=G, do=grad, scale=scale, **chunks)
    gradient_DNKX = _states(k, grad, sequences.num_documents)
    key_dim, value_dim = k.shape[3], grad.shape[3]
    block = 32 if key_dim <= 64 else 64
    for document in range(sequences.num_documents):
        # Not FLA's function, whose grid has the transition's columns too: half of the programs.
        chunk_cp_bwd_kernel_dh[ceil_div(value_dim, block), grad.shape[2]](
            q=q,
            k=k,
            w=w,
            g=G,
            gk=None,
            do=grad,
            dhm=gradient_DNKX[document],
            dv=dv,
            cu_seqlens=sequences.cu_seqlens[document : document + 2],
            scale=scale,
            T=k.shape[1],
            H=k.shape[2],
            HV=grad.shape[2],
            K=key_dim,
            V=value_dim,
            BT=CHUNK_SIZE,
            BV=block,
            BK=next_power_of_2(key_dim),
            USE_BG=False,
        )
    return gradient_DNKX[..., :value_dim]


def joined(parts_DSNKX: torch.Tensor, *, value_dim: int) -> torch.Tensor:
    """States and transitions of whole documents ``[D, N, K, X]``, of those of their segments.

    Of two in a row the state is ``M' S + S'`` and the transition ``M' M``: one product of all columns.

    Args:
        parts_DSNKX: ``[S | M]`` of each segment, fp32; a power of two for each document.
        value_dim: V.
    """
    while parts_DSNKX.shape[1] > 1:
        before, behind = parts_DSNKX[:, 0::2], parts_DSNKX[:, 1::2]
        parts_DSNKX = behind[..., value_dim:] @ before
        parts_DSNKX[..., :value_dim] += behind[..., :value_dim]
    return parts_DSNKX.squeeze(1)


def _num_segments(sequences: VarlenMetadata) -> int:
    """Of each document: as many as there are to be, or as the longest has chunks, rounded down to a power of two."""
    of_each = max(1, NUM_SEGMENTS // sequences.num_documents)
    return 1 << (min(of_each, ceil_div(sequences.max_length, CHUNK_SIZE)).bit_length() - 1)


def _segments(sequences: VarlenMetadata, count: int) -> torch.Tensor:
    """Int32 ``[D S + 1]``, where segments begin, at chunks of their documents; the last ones may be empty."""
    begins_D, ends_D = sequences.cu_seqlens[:-1, None], sequences.cu_seqlens[1:, None]
    # On the device, whose lengths they are of: a copy from the host would wait for it.
    chunks_D = (ends_D - begins_D + CHUNK_SIZE - 1) // CHUNK_SIZE
    tokens_D = (chunks_D + count - 1) // count * CHUNK_SIZE
    firsts_S = torch.arange(count, dtype=torch.int32, device=begins_D.device)
    begins_DS = torch.minimum(begins_D + firsts_S * tokens_D, ends_D)
    return torch.cat((begins_DS.flatten(), ends_D[-1])).int()


def _batch_of_one(*operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """As FLA's functions take packed documents."""
    return tuple(x.contiguous().unsqueeze(0) for x in operands)


def _chunks(sequences: VarlenMetadata) -> dict[str, Any]:
    return {
        "cu_seqlens": sequences.cu_seqlens,
        "chunk_indices": sequences.chunk_indices(CHUNK_SIZE),
        "chunk_size": CHUNK_SIZE,
    }


def _states(k: torch.Tensor, v: torch.Tensor, count: int) -> torch.Tensor:
    """Room for ``count`` states and transitions, ``[..., N, K, X]``."""
    heads, value_dim, key_dim = *v.shape[2:], k.shape[3]
    return k.new_empty(count, heads, key_dim, value_dim + key_dim, dtype=torch.float32)
