"""The gated delta rule by FlashQLA's fused TileLang kernels (Hopper and data-centre Blackwell, heads of 128).

Three times as fast as FLA's on an H100, and closer to the exact gradient of g (docs/benchmarks/one-hopper-gpu.md).

TileLang compiles by nvcc what is not in its cache folder: seven kernels for each number of heads, the longest in 40 s.
They are compiled side by side before the first call. The form for packed documents serves rows of one document as
well, at a twentieth more time, so that there is no second form to compile.

Letters: T tokens, D documents, H key heads, N value heads, K key head dim, V value head dim.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import flash_qla
import torch
from flash_qla.ops.gated_delta_rule import chunk as stages
from flash_qla.utils.index import prepare_varlen_metadata

from qwen3next_train.kernels.parallel_compile import call_side_by_side
from qwen3next_train.kernels.varlen import VarlenMetadata
from qwen3next_train.log import get_logger

CHUNK_SIZE = 64
"""Tokens per chunk on Hopper and on data-centre Blackwell."""
HEAD_DIM = 128
"""Of keys and values, the only one there is."""


def gated_delta_rule_flash_qla(
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
    """Inputs that are not contiguous are copied by FlashQLA."""
    _compile(k_THK.shape[1], v_TNV.shape[1], q_THK.dtype, q_THK.device)
    out, final_state = flash_qla.chunk_gated_delta_rule(
        q_THK.unsqueeze(0),
        k_THK.unsqueeze(0),
        v_TNV.unsqueeze(0),
        g_TN.unsqueeze(0),
        beta_TN.unsqueeze(0),
        initial_state=initial_state_DNKV,
        output_final_state=output_final_state,
        cu_seqlens=sequences.derived(("flash_qla", 0), lambda: _with_chunks(sequences)),
        # Splitting a document over several programs is decided on the host, which would wait for the device.
        auto_cp=False,
    )
    return out.squeeze(0), final_state


def _with_chunks(sequences: VarlenMetadata) -> torch.Tensor:
    """Document starts that carry what FlashQLA would otherwise ask the device for."""
    return prepare_varlen_metadata(sequences.cu_seqlens, sequences.cu_seqlens_cpu)


@functools.cache
def _compile(key_heads: int, value_heads: int, dtype: torch.dtype, device: torch.device) -> None:
    """Call each stage of training once, on one chunk of zeros."""
    # A line for every kernel that begins or ends to compile; importing TileLang sets the level.
    logging.getLogger("tilelang").setLevel(logging.WARNING)
    get_logger().info("FlashQLA: its kernels are compiled unless they are in TileLang's cache; this can take a minute")
    starts = torch.tensor([0, CHUNK_SIZE], dtype=torch.int32)
    cu_seqlens = prepare_varlen_metadata(starts.to(device), starts)

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(1, *shape, dtype=dtype, device=device)

    q, v = zeros(CHUNK_SIZE, key_heads, HEAD_DIM), zeros(CHUNK_SIZE, value_heads, HEAD_DIM)
    g, beta = zeros(CHUNK_SIZE, value_heads, dtype=torch.float32), zeros(CHUNK_SIZE, value_heads)
    a, h = zeros(CHUNK_SIZE, value_heads, CHUNK_SIZE), zeros(1, value_heads, HEAD_DIM, HEAD_DIM)
    operands = {"k": q, "v": v, "a": a, "g": g, "b": beta, "cu_seqlens": cu_seqlens}
    fixed = {"scale": HEAD_DIM**-0.5, "state_v_first": False}
    calls: list[Callable[[], object]] = [
        lambda: stages.fused_gdr_bwd(q=q, do=v, dht=None, h=h, **operands, **fixed),
        lambda: stages.fused_gdr_fwd(q=q, output_final_state=False, raw_cu_seqlens=cu_seqlens, **operands, **fixed),
        lambda: stages.fused_gdr_h(output_final_state=False, **operands),
        lambda: stages.kkt_solve(k=q, b=beta, cu_seqlens=cu_seqlens),
        lambda: stages.chunk_local_cumsum(g, cu_seqlens=cu_seqlens),
        lambda: stages.chunk_local_cumsum(g, cu_seqlens=cu_seqlens, reverse=True, zero_last_chunk=True),
        lambda: stages.group_reduce_vector(v, key_heads),
    ]

    call_side_by_side(calls, device)
