"""Routing to experts in plain torch, the contract of its backends: the router, and the order of the rows it makes.

Letters: T tokens, D hidden, E experts, K experts per token, r rows of the micro-batch, S = T / r tokens per row,
X = S K chosen experts of a row, P = T K pairs of token and expert, R rows (as many as there are pairs with an expert
here, or room for more).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from qwen3next_train.kernels.norms import at_least_fp32


class Routing(NamedTuple):
    """What one router decided for one micro-batch.

    Args:
        weights_TK: fp32 ``[T, K]``, weights of the chosen experts, largest first; differentiable.
        ids_TK: int64 ``[T, K]``, chosen experts; which of equal ones is left open.
        mean_prob_rE: fp32 ``[r, E]``, mean softmax probability of each expert over the row; differentiable.
        counts_rE: int64 ``[r, E]``, tokens sent to each expert.
        z: fp32 scalar, mean over tokens of ``logsumexp(logits) ** 2``; differentiable on demand.
        entropy: fp32 scalar, mean entropy of the probabilities in nats; detached.
    """

    weights_TK: torch.Tensor
    ids_TK: torch.Tensor
    mean_prob_rE: torch.Tensor
    counts_rE: torch.Tensor
    z: torch.Tensor
    entropy: torch.Tensor


TopKRouting = Callable[..., Routing]
"""A backend of :func:`top_k_routing_reference`."""


def top_k_routing_reference(
    x_TD: torch.Tensor,
    weight_ED: torch.Tensor,
    *,
    top_k: int,
    renormalize: bool,
    num_rows: int,
    with_z_grad: bool,
) -> Routing:
    """Route tokens; logits ``x weight^T`` and all that follows are accurate to at least fp32.

    Nothing here waits for the device.

    Args:
        x_TD: ``[T, D]``, any floating dtype.
        weight_ED: ``[E, D]``.
        top_k: K.
        renormalize: divide the K weights by their sum.
        num_rows: r, a divisor of T.
        with_z_grad: let gradients flow through ``z``.
    """
    x_TD = at_least_fp32(x_TD)
    logits_TE = F.linear(x_TD, weight_ED.to(x_TD.dtype))
    return route_logits(logits_TE, top_k=top_k, renormalize=renormalize, num_rows=num_rows, with_z_grad=with_z_grad)


def route_logits(
    logits_TE: torch.Tensor, *, top_k: int, renormalize: bool, num_rows: int, with_z_grad: bool
) -> Routing:
    """What follows from the logits, fp32 ``[T, E]``."""
    num_experts = logits_TE.shape[1]
    probs_TE = logits_TE.softmax(-1)
    weights_TK, ids_TK = probs_TE.topk(top_k, dim=-1)
    if renormalize:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    ids_rX = ids_TK.reshape(num_rows, -1)
    counts_rE = torch.zeros(num_rows, num_experts, dtype=torch.int64, device=ids_rX.device)
    counts_rE.scatter_add_(1, ids_rX, torch.ones_like(ids_rX))
    normalizer_T = torch.logsumexp(logits_TE if with_z_grad else logits_TE.detach(), dim=-1)
    with torch.no_grad():
        entropy = (normalizer_T - (probs_TE * logits_TE).sum(-1)).mean()
    mean_prob_rE = probs_TE.view(num_rows, -1, num_experts).mean(1)
    return Routing(weights_TK, ids_TK, mean_prob_rE, counts_rE, normalizer_T.square().mean(), entropy)


@dataclass(frozen=True, eq=False)
class Permutation:
    """Routed rows sorted by expert.

    Where there is room for more rows than there are pairs, the rows behind the last hold nothing: what stands there is
    never read as a number.

    Args:
        token_R: int64 ``[R]``, token of each sorted row.
        row_TK: int64 ``[T, K]``, sorted row of each token's k-th expert, -1 where the token has none.
        counts_E: int64 ``[E]``, pairs per expert, those included for which there is no room.
    """

    token_R: torch.Tensor
    row_TK: torch.Tensor
    counts_E: torch.Tensor


class TokenPermutation:
    """Sorts routed tokens by expert and brings the experts' outputs back. Backends override all of it.

    Nothing here waits for the device. No atomics on floating-point values anywhere, so that a repeated step is equal
    bit for bit.
    """

    def sort(self, expert_ids_TK: torch.Tensor, num_experts: int, num_rows: int) -> Permutation:
        """Stable order of all (token, expert) pairs by expert.

        Args:
            expert_ids_TK: int64 ``[T, K]``, -1 for no expert.
            num_experts: E.
            num_rows: R, room for rows. Pairs that come behind it in the order get no row.

        Returns:
            the order, on the device of the ids.
        """
        ids_P = expert_ids_TK.flatten()
        # Pairs without an expert are sorted behind the last expert and cut off.
        keys_P = ids_P.where(ids_P >= 0, num_experts)
        order_P = torch.argsort(keys_P, stable=True)
        row_P = torch.empty_like(order_P)
        row_P[order_P] = torch.arange(order_P.numel(), device=order_P.device)
        counts_E = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids_P.device)
        counts_E.scatter_add_(0, keys_P, torch.ones_like(keys_P))
        row_TK = row_P.where((ids_P >= 0) & (row_P < num_rows), -1).view_as(expert_ids_TK)
        token_R = order_P.new_zeros(num_rows)
        token_P = order_P[:num_rows] // expert_ids_TK.shape[1]
        token_R[: token_P.shape[0]] = token_P
        return Permutation(token_R, row_TK, counts_E[:num_experts])

    def permute(self, x_TD: torch.Tensor, permutation: Permutation) -> torch.Tensor:
        """Copy each token to its sorted rows: ``[T, D]`` to ``[R, D]``; differentiable."""
        return _Permute.apply(x_TD, permutation.token_R, permutation.row_TK)

    def permute_weights(self, weights_TK: torch.Tensor, permutation: Permutation) -> torch.Tensor:
        """Weight of each sorted row: ``[T, K]`` to ``[R]``; differentiable.

        Weights of pairs without a row are not read and get gradient 0.
        """
        return _PermuteWeights.apply(weights_TK, permutation.token_R.shape[0], permutation.row_TK)

    def unpermute(self, rows_RD: torch.Tensor, permutation: Permutation) -> torch.Tensor:
        """Sum over k of ``rows[row[t, k]]``, accumulated in at least fp32: ``[R, D]`` to ``[T, D]``; differentiable.

        The transpose of ``permute``. Rows are weighed where they are made (``gates.swiglu_reference``): neither they
        nor their weights are then needed here in the backward pass.
        """
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
    def forward(ctx, weights_TK, num_rows, row_TK):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(row_TK)
        # Pairs without a row write to an element behind the last.
        weights_R = weights_TK.new_zeros(num_rows + 1)
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
    total_TD = rows_RD.new_zeros(row_TK.shape[0], rows_RD.shape[1], dtype=_sum_dtype(rows_RD))
    for row_T in row_TK.unbind(1):
        total_TD += _rows(rows_RD, row_T)
    return total_TD.to(rows_RD.dtype)


def _rows(rows_RD: torch.Tensor, row_T: torch.Tensor) -> torch.Tensor:
    """``rows_RD[row_T]``, zero where the row is -1."""
    if rows_RD.shape[0] == 0:
        return rows_RD.new_zeros(row_T.shape[0], rows_RD.shape[1])
    found_TD = rows_RD.index_select(0, row_T.clamp(min=0))
    return found_TD.masked_fill_((row_T < 0).unsqueeze(1), 0)


def _sum_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
