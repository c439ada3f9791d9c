"""Gated RMSNorm in plain torch, fp32 throughout."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def gated_rms_norm_reference(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
    """See the package for the contract."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x = x.to(wide)
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(wide)
    return (normed * F.silu(gate.to(wide))).to(gate.dtype)
