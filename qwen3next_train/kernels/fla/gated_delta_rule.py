"""The gated delta rule by flash-linear-attention's Triton kernels (CUDA only).

Letters: T tokens, D documents, H key heads, N value heads, K key head dim, V value head dim.
"""

from __future__ import annotations

import torch
from fla.ops.gated_delta_rule import chunk_gated_delta_rule

from qwen3next_train.kernels.varlen import VarlenMetadata

CHUNK_SIZE = 64
"""Tokens per chunk: the size for which FLA fuses the triangular solve."""


def gated_delta_rule_fla(
    q_THK: torch.Tensor,
    k_THK: torch.Tensor,
    v_TNV: torch.Tensor,
    *,
    g_TN: torch.Tensor,
    beta_TN: torch.Tensor,
    sequences: VarlenMetadata,
    initial_state_DNKV: torch.Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Value heads stay grouped: FLA's kernels take them so. Inputs that are not contiguous are copied by FLA."""
    out, final_state = chunk_gated_delta_rule(
        q_THK.unsqueeze(0),
        k_THK.unsqueeze(0),
        v_TNV.unsqueeze(0),
        g_TN.unsqueeze(0),
        beta_TN.unsqueeze(0),
        initial_state=initial_state_DNKV,
        output_final_state=output_final_state,
        cu_seqlens=sequences.cu_seqlens,
        chunk_indices=sequences.chunk_indices(CHUNK_SIZE),
        chunk_size=CHUNK_SIZE,
    )
    return out.squeeze(0), final_state
