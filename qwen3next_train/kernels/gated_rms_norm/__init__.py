"""RMSNorm followed by a SiLU gate, the output norm of Gated DeltaNet: contract of its backends."""

from __future__ import annotations

from typing import Protocol

import torch


class GatedRmsNorm(Protocol):
    """What every backend computes."""

    def __call__(self, x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
        """``x / rms(x) * weight * silu(gate)`` over the last dimension, rounded once at the end.

        Args:
            x: ``[..., V]``.
            gate: ``[..., V]``, same shape as ``x``.
            weight: ``[V]``, centred on 1.
            eps: added to the mean square.

        Returns:
            ``[..., V]`` in the dtype of ``gate``.
        """
