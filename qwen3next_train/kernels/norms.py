"""Norms in plain torch, each the contract of its backends: RMSNorm and fused add + RMSNorm, QK norm + RoPE, gated norm.

Letters: T tokens, D hidden, N heads, H head dim, r rotated dims (the first of each head), V value head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

QkNormRope = Callable[..., torch.Tensor]
"""A backend of :func:`qk_norm_rope_reference`."""
GatedRmsNorm = Callable[..., torch.Tensor]
"""A backend of :func:`gated_rms_norm_reference`."""


def at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    """``x`` in fp32 if its dtype is narrower, else ``x`` itself."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RmsNorm:
    """Zero-centred RMSNorm: alone, beside its input, and as fused add + RMSNorm. Backends override all of it."""

    def normalize(self, x: torch.Tensor, weight_D: torch.Tensor, *, eps: float) -> torch.Tensor:
        """``x / rms(x) * (1 + weight)`` over the last dimension, in at least fp32 and rounded once.

        Args:
            x: ``[..., D]``.
            weight_D: ``[D]``, centred on 0.
            eps: added to the mean square.

        Returns:
            the shape and dtype of ``x``.
        """
        x_fp32 = at_least_fp32(x)
        normed = x_fp32 * torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + eps)
        return (normed * (1 + weight_D.to(x_fp32.dtype))).to(x.dtype)

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
        return x_TD, self.normalize(x_TD, weight_D, eps=eps)

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
        sum_TD = x_TD + y_TD
        return sum_TD, self.normalize(sum_TD, weight_D, eps=eps)


def qk_norm_rope_reference(
    x_TNH: torch.Tensor, weight_H: torch.Tensor, cos_T1r: torch.Tensor, sin_T1r: torch.Tensor, *, eps: float
) -> torch.Tensor:
    """Zero-centred RMSNorm of every head, rounded; then the first r dims turned, in fp32 and rounded.

    With ``n`` the norm and ``half = r / 2``, dim i becomes ``n[i] cos[i] + n[i + half] sin[i]`` below ``half`` and
    ``n[i] cos[i] + n[i - half] sin[i]`` from there to r. One call for queries, one for keys.

    Args:
        x_TNH: ``[T, N, H]``, heads may lie apart (a part of a wider projection); its last dimension is dense.
        weight_H: ``[H]``, centred on 0.
        cos_T1r: fp32 ``[T, 1, r]``; r is even and at most H.
        sin_T1r: fp32 ``[T, 1, r]``, the first half negated.
        eps: added to the mean square.

    Returns:
        contiguous ``[T, N, H]`` in the dtype of ``x_TNH``.
    """
    return rotate(RmsNorm().normalize(x_TNH, weight_H, eps=eps), cos_T1r, sin_T1r)


def rotate(x_TNH: torch.Tensor, cos_T1r: torch.Tensor, sin_T1r: torch.Tensor) -> torch.Tensor:
    """Rotate the first r dims of every head; fp32 inside, rounded once."""
    rotated = cos_T1r.shape[-1]
    turn, keep = x_TNH.split((rotated, x_TNH.shape[-1] - rotated), dim=-1)
    first, second = turn.chunk(2, dim=-1)
    swapped = torch.cat((second, first), dim=-1)
    turned = turn * cos_T1r + swapped * sin_T1r
    return torch.cat((turned.to(x_TNH.dtype), keep), dim=-1)


def gated_rms_norm_reference(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
    """``x / rms(x) * weight * silu(gate)`` over the last dimension, in at least fp32 and rounded once at the end.

    The output norm of Gated DeltaNet.

    Args:
        x: ``[..., V]``.
        gate: ``[..., V]``, same shape as ``x``.
        weight: ``[V]``, centred on 1.
        eps: added to the mean square.

    Returns:
        ``[..., V]`` in the dtype of ``gate``.
    """
    x = at_least_fp32(x)
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)
    return (normed * F.silu(gate.to(x.dtype))).to(gate.dtype)
