"""The gated delta rule by flash-linear-attention's Triton kernels, and ours for the gradients inside chunks (CUDA).

Saved for the backward pass: q, k, v, beta, the decays cumulated within chunks and each chunk's inverse; the states are
computed again.
"""

from __future__ import annotations

from typing import Any

import torch
from fla.ops.common.chunk_delta_h import chunk_gated_delta_rule_bwd_dhu, chunk_gated_delta_rule_fwd_h
from fla.ops.common.chunk_o import chunk_bwd_dv_local
from fla.ops.gated_delta_rule.chunk import chunk_gated_delta_rule_fwd
from fla.ops.gated_delta_rule.wy_fast import recompute_w_u_fwd

from qwen3next_train.kernels.gated_delta_rule.chunk_gradients import ChunkStates, chunk_gradients
from qwen3next_train.kernels.sequences import Sequences

CHUNK_SIZE = 64
"""Tokens per chunk: the size for which FLA fuses the triangular solve."""


def gated_delta_rule_fla(
    q_THK: torch.Tensor,
    k_THK: torch.Tensor,
    v_TNV: torch.Tensor,
    *,
    g_TN: torch.Tensor,
    beta_TN: torch.Tensor,
    sequences: Sequences,
    initial_state_DNKV: torch.Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See the package for the contract. Value heads stay grouped; inputs that are not contiguous are copied."""
    return _GatedDeltaRule.apply(
        q_THK,
        k_THK,
        v_TNV,
        g_TN,
        beta_TN,
        initial_state_DNKV,
        output_final_state,
        sequences.cu_seqlens,
        sequences.chunk_indices(CHUNK_SIZE),
    )


class _GatedDeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_THK: torch.Tensor,
        k_THK: torch.Tensor,
        v_TNV: torch.Tensor,
        g_TN: torch.Tensor,
        beta_TN: torch.Tensor,
        initial_state_DNKV: torch.Tensor | None,
        output_final_state: bool,
        cu_seqlens: torch.Tensor,
        chunk_indices: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # FLA's functions take a batch of one that holds all documents.
        q, k, v, g, beta = (x.contiguous().unsqueeze(0) for x in (q_THK, k_THK, v_TNV, g_TN, beta_TN))
        scale = k.shape[-1] ** -0.5
        G, out, A, final_state, _, _ = chunk_gated_delta_rule_fwd(
            q,
            k,
            v,
            g,
            beta,
            scale,
            initial_state_DNKV,
            output_final_state,
            cu_seqlens=cu_seqlens,
            chunk_indices=chunk_indices,
            chunk_size=CHUNK_SIZE,
        )
        ctx.save_for_backward(q, k, v, beta, G, A, initial_state_DNKV, cu_seqlens, chunk_indices)
        ctx.scale = scale
        return out.squeeze(0), final_state

    @staticmethod
    def backward(ctx: Any, do_TNV: torch.Tensor, dfinal_DNKV: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        q, k, v, beta, G, A, initial_state_DNKV, cu_seqlens, chunk_indices = ctx.saved_tensors
        do = do_TNV.contiguous().unsqueeze(0)
        packing = {"cu_seqlens": cu_seqlens, "chunk_indices": chunk_indices}
        chunks = packing | {"chunk_size": CHUNK_SIZE}
        w, u = recompute_w_u_fwd(k=k, v=v, beta=beta, A=A, g=G, **packing)
        h, v_new, _ = chunk_gated_delta_rule_fwd_h(k=k, w=w, u=u, g=G, initial_state=initial_state_DNKV, **chunks)
        dv = chunk_bwd_dv_local(q=q, k=k, g=G, do=do, scale=ctx.scale, **chunks)
        dh, dinitial_DNKV, dv = chunk_gated_delta_rule_bwd_dhu(
            q=q, k=k, w=w, g=G, h0=initial_state_DNKV, dht=dfinal_DNKV, do=do, dv=dv, scale=ctx.scale, **chunks
        )
        gradients = chunk_gradients(
            q.squeeze(0),
            k.squeeze(0),
            v.squeeze(0),
            G_TN=G.squeeze(0),
            beta_TN=beta.squeeze(0),
            A_TNC=A.squeeze(0),
            do_TNV=do.squeeze(0),
            states=ChunkStates(v_new.squeeze(0), h.squeeze(0), dv.squeeze(0), dh.squeeze(0)),
            scale=ctx.scale,
            **packing,
        )
        return (
            gradients.dq_THK,
            gradients.dk_THK,
            gradients.dv_TNV,
            gradients.dg_TN,
            gradients.dbeta_TN,
            dinitial_DNKV,
            None,
            None,
            None,
        )
