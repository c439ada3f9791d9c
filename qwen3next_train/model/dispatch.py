"""Sending tokens to experts and bringing them back, without atomics so that repeats are bit-equal.

Letters: T tokens, D hidden, K experts per token, E experts, e local experts, R = T * K routed rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch


class TokenDispatcher(Protocol):
    """The seam at which expert parallelism enters the model."""

    def dispatch(
        self, x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Bring every routed row to the rank of its expert.

        Args:
            x_TD: this rank's tokens ``[T, D]``.
            expert_ids_TK: int64 ``[T, K]`` global expert ids.
            weights_TK: fp32 ``[T, K]`` weights of the experts' outputs.

        Returns:
            rows of this rank's experts sorted by local expert ``[R', D]``, their int64 counts ``[e]``, and
            what ``combine`` needs to bring the rows back.
        """

    def combine(self, rows_RD: torch.Tensor, state: Any) -> torch.Tensor:
        """Expert outputs, in the order ``dispatch`` gave, to the weighted sum per token ``[T, D]``."""


@dataclass(frozen=True, eq=False)
class Permutation:
    """Routed rows sorted by expert.

    Args:
        token_R: int64 ``[R]``, token of each sorted row.
        row_TK: int64 ``[T, K]``, sorted row of each token's k-th expert.
        counts_E: int64 ``[E]``, rows per expert.
    """

    token_R: torch.Tensor
    row_TK: torch.Tensor
    counts_E: torch.Tensor


def sort_by_expert(expert_ids_TK: torch.Tensor, num_experts: int) -> Permutation:
    """Stable sort of all (token, expert) pairs by expert, without a host synchronisation."""
    flat_R = expert_ids_TK.flatten()
    order_R = torch.argsort(flat_R, stable=True)
    row_R = torch.empty_like(order_R)
    row_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=flat_R.device)
    counts_E.scatter_add_(0, flat_R, torch.ones_like(flat_R))
    return Permutation(order_R // expert_ids_TK.shape[1], row_R.view_as(expert_ids_TK), counts_E)


def permute(x_TD: torch.Tensor, permutation: Permutation) -> torch.Tensor:
    """Copy each token to its K sorted rows: ``[T, D]`` to ``[R, D]``."""
    return _Permute.apply(x_TD, permutation.token_R, permutation.row_TK)


def weighted_unpermute(rows_RD: torch.Tensor, weights_TK: torch.Tensor, permutation: Permutation) -> torch.Tensor:
    """Sum over k of ``weights[t, k] * rows[row[t, k]]``, accumulated in fp32: ``[R, D]`` to ``[T, D]``."""
    return _WeightedUnpermute.apply(rows_RD, weights_TK, permutation.row_TK)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, token_R, row_TK):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(row_TK)
        return x_TD.index_select(0, token_R)

    @staticmethod
    def backward(ctx, grad_RD):  # type: ignore[no-untyped-def]
        (row_TK,) = ctx.saved_tensors
        columns = row_TK.unbind(1)
        total_TD = grad_RD.index_select(0, columns[0]).to(_wide(grad_RD))
        for row_T in columns[1:]:
            total_TD += grad_RD.index_select(0, row_T)
        return total_TD.to(grad_RD.dtype), None, None


class _WeightedUnpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RD, weights_TK, row_TK):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(rows_RD, weights_TK, row_TK)
        num_tokens, num_chosen = row_TK.shape
        total_TD = torch.zeros(num_tokens, rows_RD.shape[1], dtype=_wide(rows_RD), device=rows_RD.device)
        for k in range(num_chosen):
            total_TD += rows_RD.index_select(0, row_TK[:, k]) * weights_TK[:, k : k + 1]
        return total_TD.to(rows_RD.dtype)

    @staticmethod
    def backward(ctx, grad_TD):  # type: ignore[no-untyped-def]
        rows_RD, weights_TK, row_TK = ctx.saved_tensors
        grad_rows_RD = torch.empty_like(rows_RD)
        grad_weights_TK = torch.empty_like(weights_TK)
        wide_TD = grad_TD.to(_wide(grad_TD))
        for k in range(row_TK.shape[1]):
            row_T = row_TK[:, k]
            grad_weights_TK[:, k] = (wide_TD * rows_RD.index_select(0, row_T)).sum(-1)
            grad_rows_RD.index_copy_(0, row_T, (wide_TD * weights_TK[:, k : k + 1]).to(rows_RD.dtype))
        return grad_rows_RD, grad_weights_TK, None


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


class LocalDispatcher:
    """Dispatcher of a rank that holds all experts.

    Args:
        num_experts: E.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def dispatch(
        self, x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[Permutation, torch.Tensor]]:
        """See :class:`TokenDispatcher`."""
        permutation = sort_by_expert(expert_ids_TK, self.num_experts)
        return permute(x_TD, permutation), permutation.counts_E, (permutation, weights_TK)

    def combine(self, rows_RD: torch.Tensor, state: tuple[Permutation, torch.Tensor]) -> torch.Tensor:
        """See :class:`TokenDispatcher`."""
        permutation, weights_TK = state
        return weighted_unpermute(rows_RD, weights_TK, permutation)
