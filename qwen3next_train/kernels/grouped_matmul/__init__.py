"""One matrix product per expert over rows sorted by expert: contract of its backends.

Letters: R rows, e local experts, I input features, O output features.
"""

from __future__ import annotations

from typing import Protocol

import torch


class GroupedMatmul(Protocol):
    """What every backend computes."""

    def __call__(self, x_RI: torch.Tensor, weight_eOI: torch.Tensor, *, counts_e: torch.Tensor) -> torch.Tensor:
        """``x[r] @ weight[expert of r]^T``; rows of expert 0 first, then expert 1, and so on.

        Every weight gets a gradient (zero for an expert without rows), also when R is 0.

        Args:
            x_RI: rows ``[R, I]`` sorted by expert.
            weight_eOI: stacked expert weights ``[e, O, I]``.
            counts_e: int64 ``[e]``, rows of each expert, summing to R, on the rows' device.

        Returns:
            ``[R, O]`` in the dtype of ``x_RI``.
        """
