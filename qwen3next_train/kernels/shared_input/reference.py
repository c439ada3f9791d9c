"""Autograd's own sum, which adds one gradient after the other and rounds each time."""

from __future__ import annotations

import torch


def shared_input_reference(x: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    """See the package for the contract."""
    return (x,) * count
