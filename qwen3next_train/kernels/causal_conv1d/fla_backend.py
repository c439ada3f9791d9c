"""Depthwise causal convolution by flash-linear-attention's Triton kernel (CUDA only)."""

from __future__ import annotations

import torch
from fla.modules.causal_conv1d import causal_conv1d

from qwen3next_train.kernels.varlen import VarlenMetadata


def causal_conv1d_fla(x_TC: torch.Tensor, weight_CW: torch.Tensor, *, sequences: VarlenMetadata) -> torch.Tensor:
    """See the package for the contract."""
    out, _ = causal_conv1d(
        x_TC.unsqueeze(0),
        weight_CW,
        activation="silu",
        cu_seqlens=sequences.cu_seqlens,
        cu_seqlens_cpu=sequences.cu_seqlens_cpu,
    )
    return out.squeeze(0)
