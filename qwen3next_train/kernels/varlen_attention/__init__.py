"""Causal softmax attention over packed documents with grouped key/value heads: contract of its backends.

Letters: T tokens, N query heads, G key/value heads (N is a multiple), H head dim.
"""

from __future__ import annotations

from typing import Protocol

import torch

from qwen3next_train.kernels.varlen import VarlenMetadata


class VarlenAttention(Protocol):
    """What every backend computes."""

    def __call__(
        self, q_TNH: torch.Tensor, k_TGH: torch.Tensor, v_TGH: torch.Tensor, *, sequences: VarlenMetadata
    ) -> torch.Tensor:
        """Each token attends to itself and the earlier tokens of its document; scale ``H ** -0.5``.

        Query head n uses key/value head ``n // (N / G)``.

        Args:
            q_TNH: queries ``[T, N, H]``.
            k_TGH: keys ``[T, G, H]``.
            v_TGH: values ``[T, G, H]``.
            sequences: document boundaries.

        Returns:
            ``[T, N, H]`` in the dtype of ``q_TNH``.
        """
