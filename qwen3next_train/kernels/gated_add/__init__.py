"""Adding a branch, each row scaled by a gate of its own: contract of its backends.

The gate's logit is computed here as well: a matrix product with one column uses a fraction of the device.

Letters: T rows, D columns.
"""

from __future__ import annotations

from typing import Protocol

import torch


class GatedAdd(Protocol):
    """What every backend computes."""

    def __call__(
        self, base_TD: torch.Tensor, branch_TD: torch.Tensor, x_TD: torch.Tensor, weight_1D: torch.Tensor
    ) -> torch.Tensor:
        """``base + branch * sigmoid(x @ weight^T)``; differentiable by all four.

        Args:
            base_TD: ``[T, D]``.
            branch_TD: ``[T, D]``.
            x_TD: ``[T, D]``, what the gate depends on.
            weight_1D: ``[1, D]`` of the gate.

        Returns:
            ``[T, D]``, dense, in the dtype of ``base_TD``.
        """
