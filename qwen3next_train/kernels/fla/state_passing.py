"""What passes the state of the gated delta rule, beside flash-linear-attention's kernels for chunks (CUDA only).

FLA solves the rule within chunks; what goes from chunk to chunk is ``kernels/triton/delta_rule_states.py``. With FLA's
own kernels for that (``fla.ops.cp``) all takes three times as long, and they have no shipped configuration: they try
six for a minute.

For the summary a document is cut into segments, which are summed up side by side and joined.

Letters: T tokens, D documents, S segments of each, H key heads, N value heads, K key head dim, V value head dim,
X = V + K columns of a state and a transition.
"""

from __future__ import annotations

from typing import Any

import torch
from fla.ops.common.chunk_o import chunk_bwd_dv_local
from fla.ops.gated_delta_rule.chunk_fwd import chunk_gated_delta_rule_fwd_intra
from fla.ops.utils import chunk_local_cumsum
from fla.ops.utils.constant import RCP_LN2

from qwen3next_train.kernels.fla.gated_delta_rule import CHUNK_SIZE
from qwen3next_train.kernels.triton.delta_rule_states import (
    MAX_JOINED_KEY_DIM,
    joined,
    state_gradient,
    sum_up_segments,
)
from qwen3next_train.kernels.triton.row_programs import ceil_div
from qwen3next_train.kernels.varlen import VarlenMetadata

NUM_SEGMENTS = 8
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
    count = _num_segments(sequences, k.shape[3])
    segments = sequences.derived(("segments", count), lambda: _segments(sequences, count))
    parts_NKX = sum_up_segments(k[0], w[0], u[0], G[0], segments, chunk=CHUNK_SIZE)
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
    """fp32; inputs that are not contiguous are copied."""
    q, k, grad, g, beta = _batch_of_one(q_THK, k_THK, grad_TNV, g_TN, beta_TN)
    chunks = _chunks(sequences)
    scale = k.shape[-1] ** -0.5
    G = chunk_local_cumsum(g, scale=RCP_LN2, **chunks)
    # Of w and u only w is read: any values do.
    w, _, _ = chunk_gated_delta_rule_fwd_intra(k=k, v=grad, g=G, beta=beta, **chunks)
    dv = chunk_bwd_dv_local(q=q, k=k, g=G, do=grad, scale=scale, **chunks)
    return state_gradient(q[0], k[0], w[0], grad[0], dv[0], G[0], sequences.cu_seqlens, chunk=CHUNK_SIZE)


def _num_segments(sequences: VarlenMetadata, key_dim: int) -> int:
    """Of each document: as many as there are to be, or as the longest has chunks.

    One where they could not be joined; such large heads have enough columns that run side by side.
    """
    if key_dim > MAX_JOINED_KEY_DIM:
        return 1
    of_each = max(1, NUM_SEGMENTS // sequences.num_documents)
    return min(of_each, ceil_div(sequences.max_length, CHUNK_SIZE))


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
