"""Expert parallelism: tokens travel to the ranks of their experts and back.

A token goes once to each rank that holds some of its experts, not once to each expert: with 10 of 512 experts
over 8 ranks that is 5.9 rows instead of 10 each way. The receiving rank copies it for its experts, sums their
weighted outputs, and one row per (token, rank) travels back. No capacity, nothing is dropped, and all sums
run in a fixed order without atomics, so a repeated step is equal bit for bit.

The payload travels while the shared expert computes, in the forward and (through the order in which autograd
runs nodes, latest first) in the backward. The number of rows has to be known on the host to post the
exchange, which costs one wait for the device per layer and pass.

Letters: T tokens of this rank, D hidden, K experts per token, P ranks, e local experts, M rows sent (one per
token and rank), N rows received, R rows of this rank's experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from qwen3next_train.kernels.routing import Permutation, TokenPermutation
from qwen3next_train.model.dispatch import ExpertRows
from qwen3next_train.model.recompute import recomputed


@dataclass(frozen=True)
class _Sent:
    """Tokens under way: ``by_rank`` sorts the tokens of this rank by destination, the rest is what arrives."""

    by_rank: Permutation
    exchange: _Exchange
    tokens_ND: torch.Tensor
    weights_NK: torch.Tensor
    ids_NK: torch.Tensor
    num_routed: int


@dataclass(frozen=True)
class _Origin:
    """How rows came to this rank's experts."""

    by_rank: Permutation
    by_expert: Permutation
    exchange: _Exchange


class AllToAllDispatcher:
    """Dispatcher of a rank that holds ``1 / P`` of the experts (``model.dispatch.TokenDispatcher``).

    Every rank of the group must call it equally often, also with tokens of which none goes anywhere else.

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

    def send(self, x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> _Sent:
        """See :class:`TokenDispatcher`; the exchange goes on until ``receive``."""
        ranks_TK = expert_ids_TK // self._num_local
        pairs_P, rows_P = self._count(ranks_TK)
        arriving_PX = rows_P.new_empty(self._num_ranks, 2)
        dist.all_to_all_single(arriving_PX, torch.stack([rows_P, pairs_P], dim=1), group=self._group)
        to_each, from_each, pairs = torch.stack([rows_P, *arriving_PX.unbind(1)]).tolist()
        by_rank = self._permutation.sort(_without_repeats(ranks_TK), self._num_ranks, sum(to_each))
        destination_M1 = torch.repeat_interleave(rows_P, output_size=sum(to_each)).unsqueeze(1)
        ids_MK = expert_ids_TK.index_select(0, by_rank.token_R) - destination_M1 * self._num_local
        # Experts of other ranks have no row there.
        ids_MK = ids_MK.masked_fill((ids_MK < 0) | (ids_MK >= self._num_local), -1)
        exchange = _Exchange(self._group, to_each, from_each)
        tokens_ND, weights_NK, ids_NK = _Send.apply(
            self._permutation.permute(x_TD, by_rank), self._permutation.permute(weights_TK, by_rank), ids_MK, exchange
        )
        return _Sent(by_rank, exchange, tokens_ND, weights_NK, ids_NK, sum(pairs))

    def receive(self, sent: _Sent) -> ExpertRows:
        """See :class:`TokenDispatcher`."""
        tokens_ND, weights_NK = _Receive.apply(sent.tokens_ND, sent.weights_NK, sent.exchange)
        by_expert = self._permutation.sort(sent.ids_NK.long(), self._num_local, sent.num_routed)
        rows_RD = recomputed("activations", lambda x_ND: self._permutation.permute(x_ND, by_expert), tokens_ND)
        weights_R = self._permutation.permute_weights(weights_NK, by_expert)
        return ExpertRows(rows_RD, weights_R, by_expert.counts_E, _Origin(sent.by_rank, by_expert, sent.exchange))

    def combine(self, rows_RD: torch.Tensor, received: ExpertRows) -> torch.Tensor:
        """See :class:`TokenDispatcher`. Sums of one rank's experts travel in the dtype of ``rows_RD``."""
        origin: _Origin = received.origin
        sums_ND = self._permutation.unpermute(rows_RD, origin.by_expert)
        sums_MD = _Return.apply(sums_ND, origin.exchange.reversed())
        return self._permutation.unpermute(sums_MD, origin.by_rank)

    def _count(self, ranks_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pairs and tokens that go to each rank, int64 ``[P]`` each."""
        num_tokens = ranks_TK.shape[0]
        pairs_TP = torch.zeros(num_tokens, self._num_ranks, dtype=torch.int64, device=ranks_TK.device)
        pairs_TP.scatter_add_(1, ranks_TK, torch.ones_like(ranks_TK))
        return pairs_TP.sum(0), (pairs_TP > 0).sum(0)


def _without_repeats(ranks_TK: torch.Tensor) -> torch.Tensor:
    """Each token's ranks, -1 where the same rank stands further left already."""
    equal_TKK = ranks_TK.unsqueeze(2) == ranks_TK.unsqueeze(1)
    return ranks_TK.masked_fill(equal_TKK.tril(-1).any(2), -1)


@dataclass
class _Exchange:
    """One uneven all-to-all of rows, its pieces known on the host, and what of it is under way.

    Args:
        group: the ranks.
        to_each: rows for each rank.
        from_each: rows from each rank.
        returning: gradients on their way back, from ``_Receive`` to ``_Send``.
    """

    group: dist.ProcessGroup
    to_each: Sequence[int]
    from_each: Sequence[int]
    returning: _Returning | None = None
    _under_way: list[tuple[Any, torch.Tensor]] = field(default_factory=list)

    def reversed(self) -> _Exchange:
        """The same rows the other way."""
        return _Exchange(self.group, self.from_each, self.to_each)

    def start(self, rows: torch.Tensor) -> torch.Tensor:
        """Post the exchange; what it returns may be read after :meth:`wait`."""
        arriving = rows.new_empty(sum(self.from_each), *rows.shape[1:])
        rows = rows.contiguous()
        # As bytes, because gloo and NCCL each lack some dtypes.
        work = dist.all_to_all_single(
            arriving.view(torch.uint8),
            rows.view(torch.uint8),
            list(self.from_each),
            list(self.to_each),
            group=self.group,
            async_op=True,
        )
        self._under_way.append((work, rows))
        return arriving

    def wait(self) -> None:
        """Everything that was started has arrived."""
        for work, _ in self._under_way:
            work.wait()
        self._under_way.clear()


@dataclass(frozen=True)
class _Returning:
    """Gradients of tokens and weights that arrive by ``exchange``."""

    exchange: _Exchange
    tokens_MD: torch.Tensor
    weights_MK: torch.Tensor


class _Send(torch.autograd.Function):
    """Starts the exchange of tokens, weights and ids; in the backward, waits for the gradients' way back.

    ``_Receive`` is its other half: what stands between the two in the forward runs during the exchange, in
    both passes.
    """

    @staticmethod
    def forward(ctx, tokens_MD, weights_MK, ids_MK, exchange):  # type: ignore[no-untyped-def]
        ctx.exchange = exchange
        # Weights and ids in one message: an exchange of a few bytes per row costs its latency.
        integer = torch.int32 if weights_MK.dtype == torch.float32 else torch.int64
        both = torch.cat([weights_MK.view(integer), ids_MK.to(integer)], dim=1)
        tokens_ND, both = exchange.start(tokens_MD), exchange.start(both)
        weights_NK, ids_NK = both.tensor_split(2, dim=1)
        weights_NK = weights_NK.view(weights_MK.dtype)
        ctx.mark_non_differentiable(ids_NK)
        return tokens_ND, weights_NK, ids_NK

    @staticmethod
    def backward(ctx, _tokens, _weights, _ids):  # type: ignore[no-untyped-def]
        # Taken out, because a node's attributes live as long as the graph.
        returning, ctx.exchange.returning = ctx.exchange.returning, None
        returning.exchange.wait()
        return returning.tokens_MD, returning.weights_MK, None, None


class _Receive(torch.autograd.Function):
    """Waits for the exchange; in the backward, starts that of the gradients."""

    @staticmethod
    def forward(ctx, tokens_ND, weights_NK, exchange):  # type: ignore[no-untyped-def]
        ctx.exchange = exchange
        exchange.wait()
        return tokens_ND.view_as(tokens_ND), weights_NK.clone()

    @staticmethod
    def backward(ctx, grad_ND, grad_NK):  # type: ignore[no-untyped-def]
        back = ctx.exchange.reversed()
        ctx.exchange.returning = _Returning(back, back.start(grad_ND), back.start(grad_NK))
        return grad_ND, grad_NK, None


class _Return(torch.autograd.Function):
    """One exchange from start to end, in both passes."""

    @staticmethod
    def forward(ctx, rows, exchange):  # type: ignore[no-untyped-def]
        ctx.exchange = exchange
        arrived = exchange.start(rows)
        exchange.wait()
        return arrived

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        back = ctx.exchange.reversed()
        arrived = back.start(grad)
        back.wait()
        return arrived, None
