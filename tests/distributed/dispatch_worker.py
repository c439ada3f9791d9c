"""Routed experts over an all-to-all against all experts on one rank, for routings of every kind of imbalance.

A task of :mod:`tests.distributed.ranks`; rank 0 writes the largest error of output and gradients over all ranks by name
of routing. On ``cpu`` in fp64; on ``cuda`` in fp32, with the Triton
permutation, all ranks on one GPU and gloo between them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from qwen3next_train.kernels.gates import shared_input_reference
from qwen3next_train.kernels.grouped_gemm import grouped_matmul_reference
from qwen3next_train.kernels.routing import Permutation, TokenPermutation
from qwen3next_train.kernels.triton.token_permutation import TokenPermutationTriton
from qwen3next_train.model.dispatch import LocalDispatcher, TokenDispatcher
from qwen3next_train.parallel.expert_parallel import AllToAllDispatcher, DenseDispatcher, ExpertRoom
from qwen3next_train.parallel.process_groups import ProcessContext

EXPERTS, TOP_K, HIDDEN = 8, 3, 6
Routed = Callable[[int, torch.Generator], torch.Tensor]


class NothingBehind(TokenPermutation):
    """Leaves NaN in the room behind the last row, of rows and of gradients."""

    def permute(self, x_TD: torch.Tensor, permutation: Permutation) -> torch.Tensor:
        """See :class:`TokenPermutation`."""
        return _NanBehind.apply(super().permute(x_TD, permutation), permutation.counts_E.sum())

    def permute_weights(self, weights_TK: torch.Tensor, permutation: Permutation) -> torch.Tensor:
        """See :class:`TokenPermutation`."""
        return _NanBehind.apply(super().permute_weights(weights_TK, permutation), permutation.counts_E.sum())

    def unpermute(self, rows_RD: torch.Tensor, permutation: Permutation) -> torch.Tensor:
        """See :class:`TokenPermutation`."""
        return super().unpermute(_NanBehind.apply(rows_RD, permutation.counts_E.sum()), permutation)


class _NanBehind(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, num_rows):  # type: ignore[no-untyped-def]
        ctx.num_rows = int(num_rows)
        return _nan_behind(rows, ctx.num_rows)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return _nan_behind(grad, ctx.num_rows), None


def _nan_behind(rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    rows = rows.clone()
    rows[num_rows:] = torch.nan
    return rows


def random_ids(num_tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Distinct random experts for each token."""
    return torch.rand(num_tokens, EXPERTS, generator=generator).argsort(1)[:, :TOP_K]


def first_experts(num_tokens: int, generator: torch.Generator) -> torch.Tensor:
    """The same experts for all tokens: with several ranks all of them on the first one or two."""
    return torch.arange(TOP_K).repeat(num_tokens, 1)


def last_experts(num_tokens: int, generator: torch.Generator) -> torch.Tensor:
    """The same experts for all tokens, on the last ranks; the first receives nothing."""
    return torch.arange(EXPERTS - TOP_K, EXPERTS).repeat(num_tokens, 1)


def one_expert(num_tokens: int, generator: torch.Generator) -> torch.Tensor:
    """A single expert for everything: all K choices of all tokens."""
    return torch.full((num_tokens, TOP_K), EXPERTS - 1)


def own_rank(num_tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Nothing leaves its rank."""
    local = EXPERTS // dist.get_world_size()
    return (torch.arange(TOP_K) % local + dist.get_rank() * local).repeat(num_tokens, 1)


ROUTINGS: dict[str, Routed] = {
    "random": random_ids,
    "first experts": first_experts,
    "last experts": last_experts,
    "one expert": one_expert,
    "own rank": own_rank,
}


def run(dispatcher: TokenDispatcher, weight: torch.Tensor, inputs: list[torch.Tensor], ids: torch.Tensor) -> list:
    """Output, then gradients of tokens, routing weights, expert weights."""
    x, routing = (tensor.clone().requires_grad_() for tensor in inputs)
    weight = weight.clone().requires_grad_()
    to_experts, to_beside = shared_input_reference(x, 2)
    received = dispatcher.dispatch(dispatcher.send_choices(dispatcher.begin_dispatch(to_experts), ids, routing))
    rows = grouped_matmul_reference(received.rows_RD, weight, counts_e=received.counts_e).sin()
    returning = dispatcher.begin_combine(rows * received.weights_R.unsqueeze(1), received)
    beside = (to_beside * 0.5).sin()
    y = dispatcher.combine(returning) + beside
    factors = torch.arange(1, HIDDEN + 1, device=y.device)
    grads = torch.autograd.grad((y * factors).sum(), (x, routing, weight))
    return [y.detach(), *grads]


def largest_error(routed: Routed, num_tokens: int, device: torch.device, *, same_number: bool) -> float:
    """Over output and gradients of this rank; expert gradients are summed over the ranks' tokens first.

    If all ranks have the same number of tokens, the dense exchange has to give the same bits.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(rank)
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    inputs = [
        torch.randn(num_tokens, HIDDEN, generator=generator).to(device, dtype),
        torch.rand(num_tokens, TOP_K, generator=generator).to(device, dtype),
    ]
    ids = routed(num_tokens, generator).to(device)
    weight = torch.randn(EXPERTS, HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(9)).to(device, dtype)
    own = slice(rank * EXPERTS // world_size, (rank + 1) * EXPERTS // world_size)
    group = dist.group.WORLD
    assert group is not None
    permutation = NothingBehind() if device.type == "cpu" else TokenPermutationTriton()
    found = run(AllToAllDispatcher(group, EXPERTS, permutation), weight[own], inputs, ids)
    expected = run(LocalDispatcher(EXPERTS, TokenPermutation()), weight, inputs, ids)
    dist.all_reduce(expected[3])
    expected[3] = expected[3][own]
    if same_number:
        room = ExpertRoom(world_size * num_tokens * TOP_K, device)
        dense = run(DenseDispatcher(group, EXPERTS, permutation, room), weight[own], inputs, ids)
        assert all(torch.equal(a, b) for a, b in zip(found, dense, strict=True)), "dense and exact differ"
        exact_room = ExpertRoom(int(room.largest), device)
        tight = run(DenseDispatcher(group, EXPERTS, permutation, exact_room), weight[own], inputs, ids)
        assert all(torch.equal(a, b) for a, b in zip(found, tight, strict=True)), "with no room to spare"
        _check_want_of_room(DenseDispatcher(group, EXPERTS, permutation, exact_room), exact_room, weight, inputs, ids)
    return max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True))


def _check_want_of_room(
    dispatcher: DenseDispatcher, room: ExpertRoom, weight: torch.Tensor, inputs: list[torch.Tensor], ids: torch.Tensor
) -> None:
    """Where there is a row too little, it is left out, known to the rank that lacks it, and spoils its loss alone."""
    needed = int(room.largest)
    most = torch.tensor([needed])
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    room.rows = int(most) - 1
    room.begin_step()
    num_local = EXPERTS // dist.get_world_size()
    own = weight[dist.get_rank() * num_local :][:num_local]
    assert all(torch.isfinite(tensor).all() for tensor in run(dispatcher, own, inputs, ids))
    assert int(room.largest) == needed
    assert bool(room.spoil(torch.ones((), device=own.device)).isnan()) == (needed == int(most))


def perform(context: ProcessContext, out: str, device: str) -> None:
    """Try every routing with various numbers of tokens, the same on all ranks and differing between them."""
    worst = {}
    for name, routed in ROUTINGS.items():
        errors = [
            largest_error(routed, tokens + uneven * context.rank, torch.device(device), same_number=not uneven)
            for tokens in (1, 16, 33)
            for uneven in (False, True)
        ]
        worst[name] = max(context.control.gather_json(max(errors)))
    if context.rank == 0:
        Path(out).write_text(json.dumps(worst))
