"""Zero-centred RMSNorm: alone, beside its input, and as fused add + RMSNorm. Contract of its backends.

Letters: T tokens, D hidden.
"""

from __future__ import annotations

from typing import Protocol

import torch


class RmsNorm(Protocol):
    """What every backend computes."""

    def normalize(self, x: torch.Tensor, weight_D: torch.Tensor, *, eps: float) -> torch.Tensor:
        """``x / rms(x) * (1 + weight)`` over the last dimension, in at least fp32 and rounded once.

        Args:
            x: ``[..., D]``.
            weight_D: ``[D]``, centred on 0.
            eps: added to the mean square.

        Returns:
            the shape and dtype of ``x``.
        """

    def rms_norm_with_residual(
        self, x_TD: torch.Tensor, weight_D: torch.Tensor, *, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``x`` as it is and normalised; the norm's backward adds the gradients of both.

        Args:
            x_TD: ``[T, D]``; must not be changed in place afterwards.
            weight_D: ``[D]``, centred on 0.
            eps: added to the mean square.

        Returns:
            a tensor that shares the memory of ``x``, and the norm, both ``[T, D]``.
        """

    def fused_add_rms_norm(
        self, x_TD: torch.Tensor, y_TD: torch.Tensor, weight_D: torch.Tensor, *, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Fused add + RMSNorm: ``x + y``, rounded, and that sum normalised.

        Args:
            x_TD: ``[T, D]``.
            y_TD: ``[T, D]``, of the same dtype.
            weight_D: ``[D]``, centred on 0.
            eps: added to the mean square.

        Returns:
            the sum and its norm, both ``[T, D]``.
        """
