"""Token permutation in plain torch. Letters: T tokens, D hidden, K experts per token, R routed rows."""

from __future__ import annotations

import torch

from qwen3next_train.kernels.token_permutation import Permutation


class TokenPermutationReference:
    """See the package for the contract."""

    def sort(self, expert_ids_TK: torch.Tensor, num_experts: int, num_routed: int) -> Permutation:
        """See the package for the contract."""
        ids_P = expert_ids_TK.flatten()
        # Pairs without an expert are sorted behind the last expert and cut off.
        keys_P = ids_P.where(ids_P >= 0, num_experts)
        order_P = torch.argsort(keys_P, stable=True)
        row_P = torch.empty_like(order_P)
        row_P[order_P] = torch.arange(order_P.numel(), device=order_P.device)
        counts_E = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids_P.device)
        counts_E.scatter_add_(0, keys_P, torch.ones_like(keys_P))
        row_TK = row_P.where(ids_P >= 0, -1).view_as(expert_ids_TK)
        return Permutation(order_P[:num_routed] // expert_ids_TK.shape[1], row_TK, counts_E[:num_experts])

    def permute(self, x_TD: torch.Tensor, permutation: Permutation) -> torch.Tensor:
        """See the package for the contract."""
        return _Permute.apply(x_TD, permutation.token_R, permutation.row_TK)

    def permute_weights(self, weights_TK: torch.Tensor, permutation: Permutation) -> torch.Tensor:
        """See the package for the contract."""
        return _PermuteWeights.apply(weights_TK, permutation.token_R.shape[0], permutation.row_TK)

    def unpermute(self, rows_RD: torch.Tensor, permutation: Permutation) -> torch.Tensor:
        """See the package for the contract."""
        return _Unpermute.apply(rows_RD, permutation.token_R, permutation.row_TK)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, token_R, row_TK):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(row_TK)
        return x_TD.index_select(0, token_R)

    @staticmethod
    def backward(ctx, grad_RD):  # type: ignore[no-untyped-def]
        (row_TK,) = ctx.saved_tensors
        return _sum_rows(grad_RD, row_TK), None, None


class _PermuteWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weights_TK, num_routed, row_TK):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(row_TK)
        # Pairs without a row write to an element behind the last.
        weights_R = weights_TK.new_zeros(num_routed + 1)
        weights_R[row_TK] = weights_TK
        return weights_R[:-1].clone()

    @staticmethod
    def backward(ctx, grad_R):  # type: ignore[no-untyped-def]
        (row_TK,) = ctx.saved_tensors
        grad_P = _rows(grad_R.unsqueeze(1), row_TK.flatten())
        return grad_P.view_as(row_TK), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RD, token_R, row_TK):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(token_R)
        return _sum_rows(rows_RD, row_TK)

    @staticmethod
    def backward(ctx, grad_TD):  # type: ignore[no-untyped-def]
        (token_R,) = ctx.saved_tensors
        return grad_TD.index_select(0, token_R), None, None


def _sum_rows(rows_RD: torch.Tensor, row_TK: torch.Tensor) -> torch.Tensor:
    """Sum of each token's rows ``[T, D]``, in the order of k."""
    total_TD = rows_RD.new_zeros(row_TK.shape[0], rows_RD.shape[1], dtype=_wide(rows_RD))
    for row_T in row_TK.unbind(1):
        total_TD += _rows(rows_RD, row_T)
    return total_TD.to(rows_RD.dtype)


def _rows(rows_RD: torch.Tensor, row_T: torch.Tensor) -> torch.Tensor:
    """``rows_RD[row_T]``, zero where the row is -1."""
    if rows_RD.shape[0] == 0:
        return rows_RD.new_zeros(row_T.shape[0], rows_RD.shape[1])
    found_TD = rows_RD.index_select(0, row_T.clamp(min=0))
    return found_TD.masked_fill_((row_T < 0).unsqueeze(1), 0)


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
