"""Sending tokens to experts and bringing them back.

Letters: T tokens, D hidden, K experts per token, E experts, e local experts, R rows of this rank's experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from qwen3next_train.kernels.routing import Permutation, TokenPermutation
from qwen3next_train.model.recompute import recomputed


@dataclass(frozen=True, eq=False)
class ExpertRows:
    """What this rank's experts have to compute.

    Args:
        rows_RD: ``[R, D]`` sorted by local expert; R may be 0, or room for more rows than there are.
        weights_R: fp32 ``[R]``, what each row's output is to be multiplied with.
        counts_e: int64 ``[e]``, rows of each expert; those behind their sum hold nothing and are not read as numbers.
        origin: where the rows came from, for the dispatcher that made them.
    """

    rows_RD: torch.Tensor
    weights_R: torch.Tensor
    counts_e: torch.Tensor
    origin: Any


class TokenDispatcher(Protocol):
    """The seam at which expert parallelism enters the model.

    What ``begin_dispatch``, ``send_choices`` and ``begin_combine`` start may go on until ``dispatch`` and ``combine``,
    so whatever needs neither is best computed in between: the router, other micro-batches, the shared expert.
    """

    def begin_dispatch(self, x_TD: torch.Tensor) -> Any:
        """Start to bring tokens to the ranks of their experts, as far as that needs no routing.

        Args:
            x_TD: this rank's tokens ``[T, D]``.

        Returns:
            what ``send_choices`` needs.
        """

    def send_choices(self, begun: Any, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> Any:
        """Start to tell the ranks of the experts which tokens are for them, as far as that needs no wait.

        Args:
            begun: what ``begin_dispatch`` returned.
            expert_ids_TK: int64 ``[T, K]`` global expert ids.
            weights_TK: fp32 ``[T, K]`` weights of the experts' outputs.

        Returns:
            what ``dispatch`` needs.
        """

    def dispatch(self, sent: Any) -> ExpertRows:
        """Rows for this rank's experts, from all ranks that share them, given what ``send_choices`` returned."""

    def begin_combine(self, rows_RD: torch.Tensor, received: ExpertRows) -> Any:
        """Start to bring back weighted expert outputs, in the order of ``received``; returns what ``combine`` needs."""

    def combine(self, begun: Any) -> torch.Tensor:
        """Their sum per token of this rank, ``[T, D]``."""


class Chosen(NamedTuple):
    """Tokens and their experts, of which nothing is under way.

    Args:
        x_TD: tokens ``[T, D]``.
        ids_TK: int64 ``[T, K]`` global expert ids.
        weights_TK: fp32 ``[T, K]``.
    """

    x_TD: torch.Tensor
    ids_TK: torch.Tensor
    weights_TK: torch.Tensor


class LocalDispatcher:
    """Dispatcher of a rank that holds all experts.

    Args:
        num_experts: E.
        permutation: selected backend.
    """

    def __init__(self, num_experts: int, permutation: TokenPermutation) -> None:
        self._num_experts = num_experts
        self._permutation = permutation

    def begin_dispatch(self, x_TD: torch.Tensor) -> torch.Tensor:
        """See :class:`TokenDispatcher`."""
        return x_TD

    def send_choices(self, begun: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> Chosen:
        """See :class:`TokenDispatcher`."""
        return Chosen(begun, expert_ids_TK, weights_TK)

    def dispatch(self, sent: Chosen) -> ExpertRows:
        """See :class:`TokenDispatcher`."""
        order = self._permutation.sort(sent.ids_TK, self._num_experts, sent.ids_TK.numel())
        rows_RD = recomputed("activations", lambda x_TD: self._permutation.permute(x_TD, order), sent.x_TD)
        weights_R = self._permutation.permute_weights(sent.weights_TK, order)
        return ExpertRows(rows_RD, weights_R, order.counts_E, order)

    def begin_combine(self, rows_RD: torch.Tensor, received: ExpertRows) -> torch.Tensor:
        """See :class:`TokenDispatcher`."""
        order: Permutation = received.origin
        return self._permutation.unpermute(rows_RD, order)

    def combine(self, begun: torch.Tensor) -> torch.Tensor:
        """See :class:`TokenDispatcher`."""
        return begun
