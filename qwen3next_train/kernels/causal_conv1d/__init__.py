"""Depthwise causal convolution with SiLU over packed documents: contract of its backends.

Letters: T tokens, C channels, W convolution width.
"""

from __future__ import annotations

from typing import Protocol

import torch

from qwen3next_train.kernels.varlen import VarlenMetadata


class CausalConv1d(Protocol):
    """What every backend computes."""

    def __call__(self, x_TC: torch.Tensor, weight_CW: torch.Tensor, *, sequences: VarlenMetadata) -> torch.Tensor:
        """``silu(sum_i weight[:, W-1-i] * x[t-i])`` with x zero before the document's first token.

        Args:
            x_TC: input ``[T, C]``.
            weight_CW: filters ``[C, W]``, the last column meets the current token.
            sequences: document boundaries.

        Returns:
            ``[T, C]`` in the dtype of ``x_TC``.
        """
