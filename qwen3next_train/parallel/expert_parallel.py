"""Expert parallelism: tokens travel to the ranks of their experts and back.

A token goes at most once to each rank, not once to each expert: with 10 of 512 experts over 8 ranks that is 5.9 rows
instead of 10 each way. The receiving rank copies it for its experts, sums their weighted outputs, and one row per
(token, rank) travels back. Nothing is dropped, and all sums run in a fixed order without atomics, over a rank's experts
in the order of a token's choices and then over the ranks: a repeated step is equal bit for bit. The sums travel back
while the shared expert computes, and so does, in the backward pass, their gradient.

Two dispatchers do so, with the same results bit for bit. :class:`AllToAllDispatcher` sends the rows that are needed;
their number has to be known on the host to post the exchange, which costs one wait for the device per layer and pass.
:class:`DenseDispatcher` sends every token to every rank, so that no size depends on the routing: nothing waits, and
tokens leave before the router has begun.

Letters: T tokens of this rank, D hidden, K experts per token, P ranks, e local experts, M rows sent (one per
token and rank), N rows received (by the dense exchange N = P T), R rows of this rank's experts, or room for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from qwen3next_train.kernels.routing import Permutation, TokenPermutation
from qwen3next_train.model.dispatch import Chosen, ExpertRows
from qwen3next_train.model.recompute import recomputed
from qwen3next_train.parallel.transfers import (
    Exchange,
    Gather,
    SumOverRanks,
    Travelling,
    UnevenAllToAll,
    rows_of_ranks,
)


class ExpertParallelDispatcher:
    """What dispatchers between ranks have in common.

    Every rank of the group must call them equally often, also with tokens of which none goes anywhere else.

    Args:
        group: the P ranks that share one set of experts; rank p of it holds experts ``[p e, (p + 1) e)``.
        num_experts: E, a multiple of P.
        permutation: selected backend.
    """

    def __init__(self, group: dist.ProcessGroup, num_experts: int, permutation: TokenPermutation) -> None:
        self._group = group
        self._num_ranks = dist.get_world_size(group)
        self._num_local = num_experts // self._num_ranks
        self._permutation = permutation

    def _choices(self, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """Weights and ids in one message ``[T, 2K]``: an exchange of a few bytes a row costs its latency."""
        ids_TK = expert_ids_TK.to(_integer_of(weights_TK))
        return torch.cat([weights_TK, ids_TK.view(weights_TK.dtype)], dim=1)

    def _receive(
        self, tokens: Travelling, choices: Travelling, num_rows: int
    ) -> tuple[torch.Tensor, torch.Tensor, Permutation]:
        """Tokens ``[N, D]`` and their :meth:`_choices` to rows of this rank's experts.

        Args:
            tokens: under way.
            choices: under way.
            num_rows: R.

        Returns:
            rows ``[R, D]``, weights ``[R]``, order.
        """
        # The tokens may still travel while their rows are sorted.
        by_expert = self._permutation.sort(self._local_ids(choices.arrived()), self._num_local, num_rows)
        rows_RD = recomputed("activations", lambda x_ND: self._permutation.permute(x_ND, by_expert), tokens.finish())
        # Behind the tokens here, so that in the backward pass the weights' gradients travel first: the router's
        # backward waits for them while those of the tokens travel.
        weights_NK, _ = choices.finish().chunk(2, dim=1)
        return rows_RD, self._permutation.permute_weights(weights_NK, by_expert), by_expert

    def _local_ids(self, choices_NX: torch.Tensor) -> torch.Tensor:
        """Local expert of each choice, int64 ``[N, K]``; -1 for experts of other ranks, which have no row here."""
        _, bits_NK = choices_NX.chunk(2, dim=1)
        ids_NK = bits_NK.contiguous().view(_integer_of(choices_NX)).long()
        ids_NK -= dist.get_rank(self._group) * self._num_local
        return ids_NK.masked_fill_((ids_NK < 0) | (ids_NK >= self._num_local), -1)


def _integer_of(weights: torch.Tensor) -> torch.dtype:
    """An integer type as wide as the weights."""
    return torch.int32 if weights.dtype == torch.float32 else torch.int64


@dataclass(frozen=True, eq=False)
class _Origin:
    """How rows came to this rank's experts."""

    by_rank: Permutation
    by_expert: Permutation
    back: Exchange


@dataclass(frozen=True, eq=False)
class _Returning:
    """Sums of the ranks' experts on their way back."""

    sums_MD: Travelling
    by_rank: Permutation


class AllToAllDispatcher(ExpertParallelDispatcher):
    """Sends the rows that are needed and no others (``model.dispatch.TokenDispatcher``)."""

    def begin_dispatch(self, x_TD: torch.Tensor) -> torch.Tensor:
        """See :class:`TokenDispatcher`. Before the routing is known, nothing can be sent."""
        return x_TD

    def send_choices(self, begun: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> Chosen:
        """See :class:`TokenDispatcher`. Before their number is known on the host, nothing can be sent."""
        return Chosen(begun, expert_ids_TK, weights_TK)

    def dispatch(self, sent: Chosen) -> ExpertRows:
        """See :class:`TokenDispatcher`."""
        pairs_TP = self._pairs(sent.ids_TK)
        goes_TP = pairs_TP > 0
        rows_P, pairs_P = goes_TP.sum(0), pairs_TP.sum(0)
        arriving_PX = rows_P.new_empty(self._num_ranks, 2)
        dist.all_to_all_single(arriving_PX, torch.stack([rows_P, pairs_P], dim=1), group=self._group)
        to_each, from_each, pairs = torch.stack([rows_P, *arriving_PX.unbind(1)]).tolist()
        ranks_P = torch.arange(self._num_ranks, device=goes_TP.device)
        by_rank = self._permutation.sort(ranks_P.where(goes_TP, -1), self._num_ranks, sum(to_each))
        choices, tokens = (
            self._exchange(to_each, from_each).start(self._permutation.permute(rows, by_rank))
            for rows in (self._choices(sent.ids_TK, sent.weights_TK), sent.x_TD)
        )
        rows_RD, weights_R, by_expert = self._receive(tokens, choices, sum(pairs))
        origin = _Origin(by_rank, by_expert, self._exchange(from_each, to_each))
        return ExpertRows(rows_RD, weights_R, by_expert.counts_E, origin)

    def begin_combine(self, rows_RD: torch.Tensor, received: ExpertRows) -> _Returning:
        """See :class:`TokenDispatcher`. Sums of one rank's experts travel in the dtype of ``rows_RD``."""
        origin: _Origin = received.origin
        return _Returning(origin.back.start(self._permutation.unpermute(rows_RD, origin.by_expert)), origin.by_rank)

    def combine(self, begun: _Returning) -> torch.Tensor:
        """See :class:`TokenDispatcher`."""
        return self._permutation.unpermute(begun.sums_MD.finish(), begun.by_rank)

    def _pairs(self, expert_ids_TK: torch.Tensor) -> torch.Tensor:
        """How many of a token's experts each rank has, int64 ``[T, P]``."""
        ranks_TK = expert_ids_TK // self._num_local
        pairs_TP = ranks_TK.new_zeros(ranks_TK.shape[0], self._num_ranks)
        return pairs_TP.scatter_add_(1, ranks_TK, torch.ones_like(ranks_TK))

    def _exchange(self, to_each: Sequence[int], from_each: Sequence[int]) -> Exchange:
        there = UnevenAllToAll(self._group, to_each, from_each)
        return Exchange(there, UnevenAllToAll(self._group, from_each, to_each))


class ExpertRoom:
    """How many rows a rank's experts have room for in a layer, and how many they got; the same room in all layers.

    Where there is too little, rows are left out and the micro-batch's loss is spoilt, so that the step that it belongs
    to changes nothing on any rank and can be repeated with more room. Nothing here waits for the device.

    Args:
        rows: R.
        device: of the model.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.rows = rows
        self.largest = torch.zeros((), dtype=torch.int64, device=device)
        """int64 scalar, most rows that a layer of this rank would have needed since :meth:`begin_step`."""

    def begin_step(self) -> None:
        """Forget what was needed so far."""
        self.largest.zero_()

    def note(self, num_rows: torch.Tensor) -> None:
        """A layer needs ``num_rows`` (int64 scalar on the device)."""
        torch.maximum(self.largest, num_rows, out=self.largest)

    def spoil(self, loss: torch.Tensor) -> torch.Tensor:
        """A micro-batch's loss, NaN with NaN gradients where a layer had too little room."""
        return loss * torch.where(self.largest > self.rows, torch.nan, 1.0)


@dataclass(frozen=True, eq=False)
class _Sent:
    """Tokens and :meth:`ExpertParallelDispatcher._choices` on their way to all ranks, and how sums come back."""

    tokens: Travelling
    choices: Travelling
    back: Exchange


class DenseDispatcher(ExpertParallelDispatcher):
    """Sends all tokens to all ranks (``model.dispatch.TokenDispatcher``); T has to be the same on all of them.

    Token t of rank s is row ``s T + t`` everywhere. Each rank computes the rows of its experts, in a buffer of fixed
    room, and sends back a sum for each token, which is 0 where it has none of the token's experts.

    Args:
        group: as of :class:`ExpertParallelDispatcher`.
        num_experts: E.
        permutation: selected backend.
        room: R.
    """

    def __init__(
        self, group: dist.ProcessGroup, num_experts: int, permutation: TokenPermutation, room: ExpertRoom
    ) -> None:
        super().__init__(group, num_experts, permutation)
        self._room = room
        self._order: Permutation | None = None

    def begin_dispatch(self, x_TD: torch.Tensor) -> Travelling:
        """See :class:`TokenDispatcher`."""
        return Exchange(Gather(self._group), self._sum_of(x_TD)).start(x_TD)

    def send_choices(self, begun: Travelling, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> _Sent:
        """See :class:`TokenDispatcher`."""
        choices_TX = self._choices(expert_ids_TK, weights_TK)
        choices = Exchange(Gather(self._group), self._sum_of(choices_TX)).start(choices_TX)
        return _Sent(begun, choices, Exchange(self._sum_of(expert_ids_TK), Gather(self._group)))

    def dispatch(self, sent: _Sent) -> ExpertRows:
        """See :class:`TokenDispatcher`."""
        rows_RD, weights_R, by_expert = self._receive(sent.tokens, sent.choices, self._room.rows)
        self._room.note(by_expert.counts_E.sum())
        ends_e = by_expert.counts_E.cumsum(0).clamp(max=self._room.rows)
        counts_e = torch.diff(ends_e, prepend=ends_e.new_zeros(1))
        return ExpertRows(rows_RD, weights_R, counts_e, (by_expert, sent.back))

    def begin_combine(self, rows_RD: torch.Tensor, received: ExpertRows) -> Travelling:
        """See :class:`TokenDispatcher`. Sums of one rank's experts travel in the dtype of ``rows_RD``."""
        by_expert, back = received.origin
        travelling: Travelling = back.start(self._permutation.unpermute(rows_RD, by_expert))
        return travelling

    def combine(self, begun: Travelling) -> torch.Tensor:
        """See :class:`TokenDispatcher`."""
        return begun.finish()

    def _sum_of(self, like_TX: torch.Tensor) -> SumOverRanks:
        """Sums the ranks' terms for as many tokens as ``like_TX`` has."""
        num_tokens = like_TX.shape[0]
        if self._order is None or self._order.row_TK.shape[0] != num_tokens:
            self._order = rows_of_ranks(num_tokens, self._num_ranks, like_TX.device)
        return SumOverRanks(self._group, self._permutation, self._order)
