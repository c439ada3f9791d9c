"""SwiGLU in plain torch; of activations narrower than fp32, SiLU and the unweighted product are rounded too."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def swiglu_reference(gate_up: torch.Tensor, weights_R: torch.Tensor | None = None) -> torch.Tensor:
    """See the package for the contract."""
    gate, up = gate_up.chunk(2, dim=-1)
    product = F.silu(gate) * up
    return product if weights_R is None else (product * weights_R.unsqueeze(1)).to(product.dtype)
