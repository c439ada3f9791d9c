"""The output gate in plain torch."""

from __future__ import annotations

import torch


def output_gate_reference(x_TNH: torch.Tensor, gate_TNH: torch.Tensor) -> torch.Tensor:
    """See the package for the contract; in bf16 the sigmoid is rounded before the product."""
    return x_TNH * gate_TNH.sigmoid()
