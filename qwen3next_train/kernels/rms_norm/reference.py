"""Zero-centred RMSNorm in plain torch."""

from __future__ import annotations

import torch


class RmsNormReference:
    """See the package for the contract."""

    def normalize(self, x: torch.Tensor, weight_D: torch.Tensor, *, eps: float) -> torch.Tensor:
        """See the package for the contract."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (normed * (1 + weight_D.to(wide.dtype))).to(x.dtype)

    def rms_norm_with_residual(
        self, x_TD: torch.Tensor, weight_D: torch.Tensor, *, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See the package for the contract."""
        return x_TD, self.normalize(x_TD, weight_D, eps=eps)

    def fused_add_rms_norm(
        self, x_TD: torch.Tensor, y_TD: torch.Tensor, weight_D: torch.Tensor, *, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See the package for the contract."""
        sum_TD = x_TD + y_TD
        return sum_TD, self.normalize(sum_TD, weight_D, eps=eps)
