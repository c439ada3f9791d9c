"""Collectives between the ranks of this run: right sums, rows that arrive where they are sent, and bandwidth."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from qwen3next_train.parallel.process_groups import ProcessContext
from qwen3next_train.selftest.check import Check

_SIZE_BYTES = 64 * 2**20
_TIMED_ROUNDS = 3


def all_reduce_check(context: ProcessContext) -> Check:
    """Sum 64 MiB of fp32 over the ranks; every rank has to call this."""
    world_size, device = context.world_size, context.device
    pattern = torch.arange(_SIZE_BYTES // 4, device=device).remainder_(1000).float()
    total = pattern + context.rank
    # Whole numbers far below 2^24: the sum is exact in every order.
    dist.all_reduce(total)
    wrong = int((total != world_size * pattern + world_size * (world_size - 1) / 2).sum())
    what = f"all-reduce of 64 MiB over {world_size} ranks ({dist.get_backend()})"
    if wrong:
        hint = "check the links, for NCCL with NCCL_DEBUG=INFO"
        return Check("all-reduce", False, f"{what}: {wrong:,} of {total.numel():,} sums are wrong; {hint}")
    if world_size == 1:
        return Check("all-reduce", True, "one process: right, no bandwidth to measure")
    seconds = _seconds_per_round(pattern.zero_(), context)
    # What each link carries, to be compared with its data sheet (nccl-tests' bus bandwidth).
    link_gb_per_s = 2 * (world_size - 1) / world_size * _SIZE_BYTES / seconds / 1e9
    return Check("all-reduce", True, f"{what}: right, {1e3 * seconds:.1f} ms, bus bandwidth {link_gb_per_s:.2f} GB/s")


def all_to_all_check(context: ProcessContext) -> Check:
    """Send a different number of rows from every rank to every rank, as experts do; every rank has to call this."""
    world_size, rank, device = context.world_size, context.rank, context.device
    others = range(world_size)
    counts_out = [_num_rows(rank, other) for other in others]
    counts_in = [_num_rows(other, rank) for other in others]
    sent = torch.cat([_rows(rank, other, device) for other in others])
    received = torch.full((sum(counts_in), sent.shape[1]), -1.0, device=device)
    dist.all_to_all_single(received, sent, counts_in, counts_out)
    expected = torch.cat([_rows(other, rank, device) for other in others])
    if not torch.equal(received, expected):
        wrong = int((received != expected).any(1).sum())
        hint = "check the links, for NCCL with NCCL_DEBUG=INFO"
        return Check("all-to-all", False, f"{wrong} of {len(expected)} rows arrived wrong; {hint}")
    return Check("all-to-all", True, f"rows between {world_size} ranks: right")


def _seconds_per_round(tensor: torch.Tensor, context: ProcessContext) -> float:
    dist.barrier()
    _wait_for(context.device)
    start = time.perf_counter()
    for _ in range(_TIMED_ROUNDS):
        dist.all_reduce(tensor)
    _wait_for(context.device)
    return (time.perf_counter() - start) / _TIMED_ROUNDS


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _num_rows(source: int, target: int) -> int:
    """Uneven, and nothing at all between some pairs."""
    return (3 * source + target) % 5


def _rows(source: int, target: int, device: torch.device) -> torch.Tensor:
    """Rows that say where they come from and go to."""
    rows = torch.arange(_num_rows(source, target), device=device)
    return torch.stack((torch.full_like(rows, source), torch.full_like(rows, target), rows), dim=1).float()
