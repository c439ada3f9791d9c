"""RMSNorm and rotary embedding in plain torch. Letters: T tokens, N heads, H head dim, r rotated dims."""

from __future__ import annotations

import torch

from qwen3next_train.kernels.rms_norm.reference import RmsNormReference


def qk_norm_rope_reference(
    x_TNH: torch.Tensor, weight_H: torch.Tensor, cos_T1r: torch.Tensor, sin_T1r: torch.Tensor, *, eps: float
) -> torch.Tensor:
    """See the package for the contract."""
    return rotate(RmsNormReference().normalize(x_TNH, weight_H, eps=eps), cos_T1r, sin_T1r)


def rotate(x_TNH: torch.Tensor, cos_T1r: torch.Tensor, sin_T1r: torch.Tensor) -> torch.Tensor:
    """Rotate the first r dims of every head; fp32 inside, rounded once."""
    rotated = cos_T1r.shape[-1]
    turn, keep = x_TNH.split((rotated, x_TNH.shape[-1] - rotated), dim=-1)
    first, second = turn.chunk(2, dim=-1)
    swapped = torch.cat((second, first), dim=-1)
    turned = turn * cos_T1r + swapped * sin_T1r
    return torch.cat((turned.to(x_TNH.dtype), keep), dim=-1)
