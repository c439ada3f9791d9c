"""What the prologue of Gated DeltaNet is given."""

from __future__ import annotations

import torch

from qwen3next_train.kernels.gdn_prologue import HeadShape
from tests.unit.kernels.interpreted import DEVICE


def make_inputs(heads: HeadShape, tokens: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Projections, filters, log rates and biases, the last two in fp32 as in the model."""
    torch.manual_seed(0)
    columns = heads.key_heads * sum(heads.group_sizes)
    return [
        torch.randn(tokens, columns, device=DEVICE).to(dtype),
        torch.randn(tokens, 2 * heads.value_heads, device=DEVICE).to(dtype),
        torch.randn(heads.channels, width, device=DEVICE).to(dtype),
        torch.randn(heads.value_heads, device=DEVICE),
        torch.randn(heads.value_heads, device=DEVICE),
    ]
