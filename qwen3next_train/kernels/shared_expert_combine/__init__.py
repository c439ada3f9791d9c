"""Adding a branch, each row scaled by a gate of its own, and a residual: contract of its backends.

The gate's logit is computed here as well: a matrix product with one column uses a fraction of the device. So is the
residual sum of which the result is a part: by itself it would read and write all of it once more.

Letters: T rows, D columns.
"""

from __future__ import annotations

from typing import Protocol

import torch


class SharedExpertCombine(Protocol):
    """What every backend computes."""

    def __call__(
        self,
        residual_TD: torch.Tensor,
        base_TD: torch.Tensor,
        branch_TD: torch.Tensor,
        x_TD: torch.Tensor,
        weight_1D: torch.Tensor,
    ) -> torch.Tensor:
        """``residual + (base + branch * sigmoid(x @ weight^T))``; differentiable by all five.

        Args:
            residual_TD: ``[T, D]``.
            base_TD: ``[T, D]``.
            branch_TD: ``[T, D]``.
            x_TD: ``[T, D]``, what the gate depends on.
            weight_1D: ``[1, D]`` of the gate.

        Returns:
            ``[T, D]``, dense, in the dtype of ``base_TD``.
        """
