"""Expert products as a loop over experts. Letters: R rows, e local experts, I input, O output features."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def grouped_matmul_reference(x_RI: torch.Tensor, weight_eOI: torch.Tensor, *, counts_e: torch.Tensor) -> torch.Tensor:
    """See the package for the contract."""
    rows = x_RI.split(counts_e.tolist())
    return torch.cat([F.linear(x, weight) for x, weight in zip(rows, weight_eOI.unbind(), strict=True)])
