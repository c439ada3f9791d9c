"""Sending tokens to experts and bringing them back.

Letters: T tokens, D hidden, K experts per token, E experts, e local experts, R rows of this rank's experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from qwen3next_train.kernels.routing import Permutation, TokenPermutation
from qwen3next_train.model.recompute import recomputed


@dataclass(frozen=True, eq=False)
class ExpertRows:
    """What this rank's experts have to compute.

    Args:
        rows_RD: ``[R, D]`` sorted by local expert; R may be 0.
        weights_R: fp32 ``[R]``, what each row's output is to be multiplied with.
        counts_e: int64 ``[e]``, rows of each expert.
        origin: where the rows came from, for the dispatcher that made them.
    """

    rows_RD: torch.Tensor
    weights_R: torch.Tensor
    counts_e: torch.Tensor
    origin: Any


class TokenDispatcher(Protocol):
    """The seam at which expert parallelism enters the model.

    ``send`` may start an exchange between ranks that goes on until ``receive``, so whatever does not need the
    experts is best computed in between.
    """

    def send(self, x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> Any:
        """Start to bring every routed row to the rank of its expert.

        Args:
            x_TD: this rank's tokens ``[T, D]``.
            expert_ids_TK: int64 ``[T, K]`` global expert ids.
            weights_TK: fp32 ``[T, K]`` weights of the experts' outputs.

        Returns:
            what ``receive`` needs.
        """

    def receive(self, sent: Any) -> ExpertRows:
        """Rows for this rank's experts, from all ranks that share them."""

    def combine(self, rows_RD: torch.Tensor, received: ExpertRows) -> torch.Tensor:
        """Weighted expert outputs, in the order of ``received``, to their sum per token of this rank ``[T, D]``."""


class LocalDispatcher:
    """Dispatcher of a rank that holds all experts.

    Args:
        num_experts: E.
        permutation: selected backend.
    """

    def __init__(self, num_experts: int, permutation: TokenPermutation) -> None:
        self._num_experts = num_experts
        self._permutation = permutation

    def send(self, x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> ExpertRows:
        """See :class:`TokenDispatcher`."""
        order = self._permutation.sort(expert_ids_TK, self._num_experts, expert_ids_TK.numel())
        rows_RD = recomputed("activations", lambda x_TD: self._permutation.permute(x_TD, order), x_TD)
        weights_R = self._permutation.permute_weights(weights_TK, order)
        return ExpertRows(rows_RD, weights_R, order.counts_E, order)

    def receive(self, sent: ExpertRows) -> ExpertRows:
        """See :class:`TokenDispatcher`."""
        return sent

    def combine(self, rows_RD: torch.Tensor, received: ExpertRows) -> torch.Tensor:
        """See :class:`TokenDispatcher`."""
        order: Permutation = received.origin
        return self._permutation.unpermute(rows_RD, order)
