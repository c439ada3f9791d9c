"""Fused QK norm + RoPE: RMSNorm of queries or keys, then partial rotary embedding. Contract of its backends.

Letters: T tokens, N heads, H head dim, r rotated dims (the first of each head).
"""

from __future__ import annotations

from typing import Protocol

import torch


class QkNormRope(Protocol):
    """What every backend computes."""

    def __call__(
        self,
        x_TNH: torch.Tensor,
        weight_H: torch.Tensor,
        cos_T1r: torch.Tensor,
        sin_T1r: torch.Tensor,
        *,
        eps: float,
    ) -> torch.Tensor:
        """Zero-centred RMSNorm of every head, rounded; then the first r dims turned, in fp32 and rounded.

        With ``n`` the norm and ``half = r / 2``, dim i becomes ``n[i] cos[i] + n[i + half] sin[i]`` below ``half`` and
        ``n[i] cos[i] + n[i - half] sin[i]`` from there to r.

        Args:
            x_TNH: ``[T, N, H]``, heads may lie apart (a part of a wider projection); its last dimension is dense.
            weight_H: ``[H]``, centred on 0.
            cos_T1r: fp32 ``[T, 1, r]``; r is even and at most H.
            sin_T1r: fp32 ``[T, 1, r]``, the first half negated.
            eps: added to the mean square.

        Returns:
            contiguous ``[T, N, H]`` in the dtype of ``x_TNH``.
        """
