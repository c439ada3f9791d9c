"""Gated addition in plain torch, rounded to the inputs' dtype after each of its five operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def shared_expert_combine_reference(
    residual_TD: torch.Tensor,
    base_TD: torch.Tensor,
    branch_TD: torch.Tensor,
    x_TD: torch.Tensor,
    weight_1D: torch.Tensor,
) -> torch.Tensor:
    """See the package for the contract."""
    return residual_TD + (base_TD + branch_TD * F.linear(x_TD, weight_1D).sigmoid())
