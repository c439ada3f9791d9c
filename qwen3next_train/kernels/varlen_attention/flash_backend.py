"""Packed causal attention by torch's variable-length flash attention (CUDA, bf16 or fp16)."""

from __future__ import annotations

import functools
import inspect

import torch
from torch.nn.attention.varlen import varlen_attn

from qwen3next_train.kernels.sequences import Sequences

_CAUSAL = (-1, 0)
# torch 2.11 takes grouped heads as they come; later versions want to be told.
_attend = (
    functools.partial(varlen_attn, enable_gqa=True)
    if "enable_gqa" in inspect.signature(varlen_attn).parameters
    else varlen_attn
)


def varlen_attention_flash(
    q_TNH: torch.Tensor, k_TGH: torch.Tensor, v_TGH: torch.Tensor, *, sequences: Sequences
) -> torch.Tensor:
    """See the package for the contract."""
    cu_seqlens, longest = sequences.cu_seqlens, sequences.max_length
    out = _attend(q_TNH, k_TGH, v_TGH, cu_seqlens, cu_seqlens, longest, longest, window_size=_CAUSAL)
    assert isinstance(out, torch.Tensor)
    return out
