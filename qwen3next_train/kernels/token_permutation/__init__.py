"""Sorting routed tokens by expert and bringing the experts' outputs back: contract of its backends.

No atomics on floating-point values anywhere, so that a repeated step is equal bit for bit.

Letters: T tokens, D hidden, K experts per token, E experts, R routed rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, eq=False)
class Permutation:
    """Routed rows sorted by expert.

    Args:
        token_R: int64 ``[R]``, token of each sorted row.
        row_TK: int64 ``[T, K]``, sorted row of each token's k-th expert, -1 where the token has none.
        counts_E: int64 ``[E]``, rows per expert.
    """

    token_R: torch.Tensor
    row_TK: torch.Tensor
    counts_E: torch.Tensor


class TokenPermutation(Protocol):
    """What every backend computes; nothing here waits for the device."""

    def sort(self, expert_ids_TK: torch.Tensor, num_experts: int, num_routed: int) -> Permutation:
        """Stable order of all (token, expert) pairs by expert.

        Args:
            expert_ids_TK: int64 ``[T, K]``, -1 for no expert.
            num_experts: E.
            num_routed: R, the number of ids that are not -1.
        """

    def permute(self, x_TD: torch.Tensor, permutation: Permutation) -> torch.Tensor:
        """Copy each token to its sorted rows: ``[T, D]`` to ``[R, D]``; differentiable."""

    def permute_weights(self, weights_TK: torch.Tensor, permutation: Permutation) -> torch.Tensor:
        """Weight of each sorted row: ``[T, K]`` to ``[R]``; differentiable.

        Weights of pairs without a row are not read and get gradient 0.
        """

    def unpermute(self, rows_RD: torch.Tensor, permutation: Permutation) -> torch.Tensor:
        """Sum over k of ``rows[row[t, k]]``, accumulated in at least fp32: ``[R, D]`` to ``[T, D]``; differentiable.

        The transpose of ``permute``. Rows are weighed where they are made (``kernels.swiglu``): neither they nor
        their weights are then needed here in the backward pass.
        """
