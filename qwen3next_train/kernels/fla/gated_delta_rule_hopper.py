"""The gated delta rule by flash-linear-attention's Triton kernels, and on Hopper ours for the gradients inside chunks.

Ours are made for the shared memory of such a GPU and for heads of up to 128; elsewhere
``fla/gated_delta_rule.py`` leaves all of the rule to FLA.

Saved for the backward pass: q, k, v, beta, the decays cumulated within chunks and each chunk's inverse; the states are
computed again.

Letters: T tokens, D documents, H key heads, N value heads, K key head dim, V value head dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from fla.ops.common.chunk_delta_h import chunk_gated_delta_rule_bwd_dhu, chunk_gated_delta_rule_fwd_h
from fla.ops.common.chunk_o import chunk_bwd_dv_local, chunk_fwd_o
from fla.ops.gated_delta_rule.chunk import chunk_gated_delta_rule_fwd
from fla.ops.gated_delta_rule.chunk_fwd import chunk_gated_delta_rule_fwd_intra
from fla.ops.gated_delta_rule.wy_fast import recompute_w_u_fwd
from fla.ops.utils import chunk_local_cumsum
from fla.ops.utils.constant import RCP_LN2

from qwen3next_train.kernels.fla.chunk_gradients import (
    ChunkInputs,
    ChunkStates,
    OutputGradients,
    output_gradients,
    write_gradients,
)
from qwen3next_train.kernels.fla.gated_delta_rule import CHUNK_SIZE
from qwen3next_train.kernels.fla.process import shipped_configs_are_used
from qwen3next_train.kernels.parallel_compile import call_side_by_side
from qwen3next_train.kernels.varlen import VarlenMetadata


def gated_delta_rule_fla_hopper(
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
    """Value heads stay grouped; inputs that are not contiguous are copied."""
    if shipped_configs_are_used() and torch.is_grad_enabled():
        # Not where FLA looks for configurations: it would time them beside each other.
        _compile(k_THK.shape[1:], v_TNV.shape[1:], q_THK.dtype, q_THK.device)
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
        initial_state_DNKV = None if initial_state_DNKV is None else initial_state_DNKV.contiguous()
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
        dfinal_DNKV = None if dfinal_DNKV is None else dfinal_DNKV.contiguous()
        packing = {"cu_seqlens": cu_seqlens, "chunk_indices": chunk_indices}
        chunks = packing | {"chunk_size": CHUNK_SIZE}
        w, u = recompute_w_u_fwd(k=k, v=v, beta=beta, A=A, g=G, **packing)
        h, v_new, _ = chunk_gated_delta_rule_fwd_h(k=k, w=w, u=u, g=G, initial_state=initial_state_DNKV, **chunks)
        dv = chunk_bwd_dv_local(q=q, k=k, g=G, do=do, scale=ctx.scale, **chunks)
        dh, dinitial_DNKV, dv = chunk_gated_delta_rule_bwd_dhu(
            q=q, k=k, w=w, g=G, h0=initial_state_DNKV, dht=dfinal_DNKV, do=do, dv=dv, scale=ctx.scale, **chunks
        )
        inputs = ChunkInputs(*(x.squeeze(0) for x in (q, k, v, G, beta, A, do)), **packing)
        states = ChunkStates(v_new.squeeze(0), h.squeeze(0), dv.squeeze(0), dh.squeeze(0))
        outputs = output_gradients(inputs, states)
        writes = write_gradients(inputs, states, outputs)
        return (
            outputs.dq_THK,
            writes.dk_THK,
            writes.dv_TNV,
            writes.dg_TN,
            writes.dbeta_TN,
            dinitial_DNKV,
            None,
            None,
            None,
        )


@functools.cache
def _compile(
    key_shape: tuple[int, int], value_shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    """Call each stage of training once, on one chunk of zeros."""
    (heads, key_dim), (value_heads, value_dim) = key_shape, value_shape

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(1, *shape, dtype=dtype, device=device)

    k, v = zeros(CHUNK_SIZE, heads, key_dim), zeros(CHUNK_SIZE, value_heads, value_dim)
    w, A = zeros(CHUNK_SIZE, value_heads, key_dim), zeros(CHUNK_SIZE, value_heads, CHUNK_SIZE)
    h, beta = zeros(1, value_heads, key_dim, value_dim), zeros(CHUNK_SIZE, value_heads)
    G, dk = zeros(CHUNK_SIZE, value_heads, dtype=torch.float32), torch.zeros_like(k, dtype=torch.float32)
    sequences = VarlenMetadata.from_lengths([CHUNK_SIZE], device)
    packing = {"cu_seqlens": sequences.cu_seqlens, "chunk_indices": sequences.chunk_indices(CHUNK_SIZE)}
    chunks = packing | {"chunk_size": CHUNK_SIZE}
    scale = key_dim**-0.5
    inputs = ChunkInputs(*(x.squeeze(0) for x in (k, k, v, G, beta, A, v)), **packing)
    states = ChunkStates(v.squeeze(0), h.squeeze(0), v.squeeze(0), h.squeeze(0))
    outputs = OutputGradients(k.squeeze(0), dk.squeeze(0), w.squeeze(0), G.squeeze(0))
    calls: list[Callable[[], object]] = [
        lambda: output_gradients(inputs, states),
        lambda: write_gradients(inputs, states, outputs),
        lambda: chunk_gated_delta_rule_bwd_dhu(
            q=k, k=k, w=w, g=G, h0=None, dht=None, do=v, dv=v, scale=scale, **chunks
        ),
        lambda: chunk_gated_delta_rule_fwd_h(k=k, w=w, u=v, g=G, initial_state=None, **chunks),
        lambda: chunk_fwd_o(q=k, k=k, v=v, h=h, g=G, scale=scale, **chunks),
        lambda: chunk_bwd_dv_local(q=k, k=k, g=G, do=v, scale=scale, **chunks),
        # With the recomputation of w and u, which follows it.
        lambda: chunk_gated_delta_rule_fwd_intra(k=k, v=v, g=G, beta=beta, **chunks),
        lambda: chunk_local_cumsum(G, scale=RCP_LN2, **chunks),
    ]
    call_side_by_side(calls, device)
