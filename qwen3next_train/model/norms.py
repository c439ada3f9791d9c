"""Zero-centred RMSNorm and the weight holder of GDN's gated norm."""

from __future__ import annotations

import torch
from torch import nn

from qwen3next_train.kernels.gated_rms_norm import GatedRmsNorm


def at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    """``x`` in fp32 if its dtype is narrower, else ``x`` itself."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class ZeroCenteredRmsNorm(nn.Module):
    """``x / rms(x) * (1 + weight)`` over the last dimension, computed in fp32 and rounded once.

    Weight decay therefore pulls the scale to 1 (Qwen3-Next's reason for decaying the q/k norms).

    Args:
        size: last dimension of the input.
        eps: added to the mean square.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., size]`` to the same shape and dtype."""
        wide = at_least_fp32(x)
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed * (1 + self.weight.to(wide.dtype))).to(x.dtype)


class GatedNorm(nn.Module):
    """RMSNorm centred on 1, times SiLU of a gate: the output norm of Gated DeltaNet.

    Args:
        size: value head dimension.
        eps: added to the mean square.
        kernel: selected backend.
    """

    def __init__(self, size: int, eps: float, kernel: GatedRmsNorm) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps
        self.kernel = kernel

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """Both ``[..., size]``; returns the same shape in the gate's dtype."""
        return self.kernel(x, gate, self.weight, eps=self.eps)
