"""What passes the state of the gated delta rule, by flash-linear-attention's Triton kernels (CUDA only).

A program for a block of columns goes over a document's chunks, forward for the summary, and from the end for the
gradient of the state at the beginning. w and u, which the rule computes as well, are most of the work. Transitions are
multiplied up in fp32.

Letters: T tokens, D documents, H key heads, N value heads, K key head dim, V value head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from fla.ops.common.chunk_o import chunk_bwd_dv_local
from fla.ops.cp.chunk_bwd import chunk_cp_bwd_dh
from fla.ops.cp.chunk_fwd import chunk_cp_fwd_h
from fla.ops.gated_delta_rule.chunk_fwd import chunk_gated_delta_rule_fwd_intra
from fla.ops.utils import chunk_local_cumsum
from fla.ops.utils.constant import RCP_LN2

from qwen3next_train.kernels.fla.gated_delta_rule import CHUNK_SIZE
from qwen3next_train.kernels.varlen import VarlenMetadata


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
    summary_DNKX = _states(k, v, sequences)
    chunk_cp_fwd_h(
        k=k,
        w=w,
        u=u,
        hm=summary_DNKX,
        g=G,
        cu_seqlens=sequences.cu_seqlens,
        chunk_size=CHUNK_SIZE,
        multi_seqs=True,
    )
    return summary_DNKX


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
    gradient_DNKX = _states(k, grad, sequences)
    for document in range(sequences.num_documents):
        chunk_cp_bwd_dh(
            q=q,
            k=k,
            w=w,
            do=grad,
            dv=dv,
            dhm=gradient_DNKX[document],
            g=G,
            scale=scale,
            cu_seqlens=sequences.cu_seqlens[document : document + 2],
            chunk_size=CHUNK_SIZE,
        )
    return gradient_DNKX[..., : grad.shape[3]]


def _batch_of_one(*operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """As FLA's functions take packed documents."""
    return tuple(x.contiguous().unsqueeze(0) for x in operands)


def _chunks(sequences: VarlenMetadata) -> dict[str, Any]:
    return {
        "cu_seqlens": sequences.cu_seqlens,
        "chunk_indices": sequences.chunk_indices(CHUNK_SIZE),
        "chunk_size": CHUNK_SIZE,
    }


def _states(k: torch.Tensor, v: torch.Tensor, sequences: VarlenMetadata) -> torch.Tensor:
    """Room for a state and a transition of each document, ``[D, N, K, V + K]``."""
    heads, value_dim, key_dim = *v.shape[2:], k.shape[3]
    shape = sequences.num_documents, heads, key_dim, value_dim + key_dim
    return k.new_empty(shape, dtype=torch.float32)
