"""What a document does to the state of the gated delta rule, by flash-linear-attention's Triton kernels (CUDA only).

One program for a block of columns of S and of M, which goes over a document's chunks; w and u, which the rule computes
again, are most of the work. M is multiplied up in fp32.

Letters: T tokens, D documents, H key heads, N value heads, K key head dim, V value head dim.
"""

from __future__ import annotations

import torch
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
    k, v, g, beta = (x.contiguous().unsqueeze(0) for x in (k_THK, v_TNV, g_TN, beta_TN))
    chunks = {
        "cu_seqlens": sequences.cu_seqlens,
        "chunk_indices": sequences.chunk_indices(CHUNK_SIZE),
        "chunk_size": CHUNK_SIZE,
    }
    G = chunk_local_cumsum(g, scale=RCP_LN2, **chunks)
    w, u, _ = chunk_gated_delta_rule_fwd_intra(k=k, v=v, g=G, beta=beta, **chunks)
    heads, key_dim, value_dim = v.shape[2], k.shape[3], v.shape[3]
    summary_DNKX = k.new_empty(sequences.num_documents, heads, key_dim, value_dim + key_dim, dtype=torch.float32)
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
