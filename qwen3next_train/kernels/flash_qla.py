"""The gated delta rule by FlashQLA's fused TileLang kernels (Hopper and data-centre Blackwell, heads of 128).

Three times as fast as FLA's on an H100, and closer to the exact gradient of g (docs/benchmarks/one-hopper-gpu.md).

TileLang compiles by nvcc what is not in its cache folder: for each number of heads seven kernels, the longest in 40 s,
one of them in up to three widths, by how many documents there are to fill the device with. All are compiled side by
side before the first call, or a later micro-batch of fewer documents would stop every rank while one compiles. The form
for packed documents serves rows of one document as well, at a twentieth more time, so that there is no second form to
compile.

Letters: T tokens, D documents, H key heads, N value heads, K key head dim, V value head dim.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import flash_qla
import torch
from flash_qla.ops.gated_delta_rule import chunk as stages
from flash_qla.utils.index import prepare_varlen_metadata

from qwen3next_train.kernels.parallel_compile import call_side_by_side
from qwen3next_train.kernels.triton.row_programs import num_processors
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
    _compile(k_THK.shape[1], v_TNV.shape[1], initial_state_DNKV is not None, q_THK.dtype, q_THK.device)
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
def _compile(key_heads: int, value_heads: int, has_state: bool, dtype: torch.dtype, device: torch.device) -> None:
    """Call each stage of training once on a chunk of zeros, the forward one on as many as there may be documents."""
    # A line for every kernel that begins or ends to compile; importing TileLang sets the level.
    logging.getLogger("tilelang").setLevel(logging.WARNING)
    get_logger().info("FlashQLA: its kernels are compiled unless they are in TileLang's cache; this can take a minute")

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    def operands(documents: int) -> dict[str, Any]:
        starts = CHUNK_SIZE * torch.arange(documents + 1, dtype=torch.int32)
        tokens = documents * CHUNK_SIZE
        return {
            "k": zeros(1, tokens, key_heads, HEAD_DIM),
            "v": zeros(1, tokens, value_heads, HEAD_DIM),
            "a": zeros(1, tokens, value_heads, CHUNK_SIZE),
            "g": zeros(1, tokens, value_heads, dtype=torch.float32),
            "b": zeros(1, tokens, value_heads),
            "cu_seqlens": prepare_varlen_metadata(starts.to(device), starts),
        }

    def state(documents: int) -> torch.Tensor | None:
        return zeros(documents, value_heads, HEAD_DIM, HEAD_DIM, dtype=torch.float32) if has_state else None

    fixed = {"scale": HEAD_DIM**-0.5, "state_v_first": False}

    def forward() -> None:
        # The usual one first. From one block a multiprocessor on the width stays.
        for documents in range(num_processors(device) // value_heads + 1, 0, -1):
            inputs = operands(documents)
            stages.fused_gdr_fwd(
                q=inputs["k"],
                initial_state=state(documents),
                output_final_state=False,
                raw_cu_seqlens=inputs["cu_seqlens"],
                **inputs,
                **fixed,
            )

    one = operands(1)
    k, v, g, starts = one["k"], one["v"], one["g"], one["cu_seqlens"]
    h = zeros(1, 1, value_heads, HEAD_DIM, HEAD_DIM)
    calls: list[Callable[[], object]] = [
        forward,
        lambda: stages.fused_gdr_bwd(q=k, do=v, dht=None, h=h, **one, **fixed),
        lambda: stages.fused_gdr_h(initial_state=state(1), output_final_state=False, **one),
        lambda: stages.kkt_solve(k=k, b=one["b"], cu_seqlens=starts),
        lambda: stages.chunk_local_cumsum(g, cu_seqlens=starts),
        lambda: stages.chunk_local_cumsum(g, cu_seqlens=starts, reverse=True, zero_last_chunk=True),
        lambda: stages.group_reduce_vector(v, key_heads),
    ]
    call_side_by_side(calls, device)
