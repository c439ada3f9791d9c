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
from qwen3next_train.kernels.routing import TokenPermutation
from qwen3next_train.kernels.triton.token_permutation import TokenPermutationTriton
from qwen3next_train.model.dispatch import LocalDispatcher, TokenDispatcher
from qwen3next_train.parallel.expert_parallel import AllToAllDispatcher
from qwen3next_train.parallel.process_groups import ProcessContext

EXPERTS, TOP_K, HIDDEN = 8, 3, 6
Routed = Callable[[int, torch.Generator], torch.Tensor]


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
    received = dispatcher.dispatch(dispatcher.begin_dispatch(to_experts), ids, routing)
    rows = grouped_matmul_reference(received.rows_RD, weight, counts_e=received.counts_e).sin()
    returning = dispatcher.begin_combine(rows * received.weights_R.unsqueeze(1), received)
    beside = (to_beside * 0.5).sin()
    y = dispatcher.combine(returning) + beside
    factors = torch.arange(1, HIDDEN + 1, device=y.device)
    grads = torch.autograd.grad((y * factors).sum(), (x, routing, weight))
    return [y.detach(), *grads]


def largest_error(routed: Routed, num_tokens: int, device: torch.device) -> float:
    """Over output and gradients of this rank; expert gradients are summed over the ranks' tokens first."""
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
    permutation = TokenPermutation() if device.type == "cpu" else TokenPermutationTriton()
    found = run(AllToAllDispatcher(group, EXPERTS, permutation), weight[own], inputs, ids)
    expected = run(LocalDispatcher(EXPERTS, TokenPermutation()), weight, inputs, ids)
    dist.all_reduce(expected[3])
    expected[3] = expected[3][own]
    return max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True))


def perform(context: ProcessContext, out: str, device: str) -> None:
    """Try every routing with various numbers of tokens, differing between ranks."""
    worst = {}
    for name, routed in ROUTINGS.items():
        errors = [largest_error(routed, tokens + context.rank, torch.device(device)) for tokens in (1, 16, 33)]
        worst[name] = max(context.control.gather_json(max(errors)))
    if context.rank == 0:
        Path(out).write_text(json.dumps(worst))
