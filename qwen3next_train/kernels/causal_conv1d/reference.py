"""Depthwise causal convolution in plain torch: one multiply-add per filter column.

Letters: T tokens, C channels, W convolution width, S slots of the layout with gaps between documents.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qwen3next_train.kernels.varlen import VarlenMetadata, gather_rows, scatter_rows


def causal_conv1d_reference(x_TC: torch.Tensor, weight_CW: torch.Tensor, *, sequences: VarlenMetadata) -> torch.Tensor:
    """See the package for the contract. W - 1 zeros before each document stand for what it must not see."""
    width = weight_CW.shape[1]
    slots_T = sequences.spaced_slots(width - 1)
    num_slots = sequences.num_tokens + (width - 1) * sequences.num_documents
    x_SC = scatter_rows(x_TC, slots_T, num_slots)
    weight_WC = weight_CW.t().contiguous()
    length = num_slots - (width - 1)
    y_SC = x_SC[:length] * weight_WC[0]
    for column in range(1, width):
        y_SC = torch.addcmul(y_SC, x_SC[column : column + length], weight_WC[column])
    return F.silu(gather_rows(y_SC, slots_T - (width - 1)))
