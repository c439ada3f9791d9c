from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

from qwen3next_train.engine.clipped_update import ClippedUpdate
from qwen3next_train.engine.divided_parameters import mark_as_expert
from qwen3next_train.engine.gradient_buckets import _Bucket, bucketed_groups
from qwen3next_train.parallel.process_groups import ProcessContext
from tests.unit.engine.test_partitioned_parameters import _as_rank, _optimizer
from tests.unit.kernels.comparison import uninitialized_is_nan


def parameter(numel: int, group_name: str = "") -> nn.Parameter:
    made = nn.Parameter(torch.empty(numel))
    if group_name:
        mark_as_expert(made, group_name)
    return made


def test_groups_are_apart_by_who_shares_them_and_in_one_order_on_all_ranks() -> None:
    """By name, as a set of names would not be: its order is another in each process."""
    names = ["tensor_size_4_shares_4", "", "ep_size_2", "tensor_size_4_shares_2", "", "ep_size_2"]
    parameters = [parameter(1, name) for name in names]
    groups = bucketed_groups([{"params": parameters, "name": "decay", "weight_decay": 0.1}], max_numel=10)
    assert [(group["name"], group.get("moe", False)) for group in groups] == [
        ("decay", False),
        ("ep_size_2", True),
        ("tensor_size_4_shares_2", True),
        ("tensor_size_4_shares_4", True),
    ]
    assert [group["params"] for group in groups] == [
        [parameters[1], parameters[4]],
        [parameters[2], parameters[5]],
        [parameters[3]],
        [parameters[0]],
    ]
    assert {group["weight_decay"] for group in groups} == {0.1}


def test_a_group_is_cut_before_it_is_too_large() -> None:
    parameters = [parameter(numel) for numel in (4, 5, 11, 3)]
    groups = bucketed_groups([{"params": parameters, "name": "decay"}], max_numel=10)
    assert [[p.numel() for p in group["params"]] for group in groups] == [[4, 5], [11], [3]]


@pytest.mark.parametrize(("num_ranks", "stays"), [(1, True), (2, True), (2, False), (3, False), (4, False)])
def test_padding_at_the_end_of_a_bucket_adds_nothing_to_the_norm(
    context: ProcessContext, num_ranks: int, stays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In memory that holds NaN where nothing was written; all ranks have the same gradients, in each of two steps."""
    gradients = [torch.tensor([3.0, 4.0]), torch.tensor([12.0])]
    sums = torch.cat(_partitions(gradients, num_ranks, stays, monkeypatch))
    # DeepSpeed pads to a multiple of twice the ranks.
    numel = 2 * num_ranks * math.ceil(3 / (2 * num_ranks))
    assert sums.tolist() == [num_ranks * value for value in (3.0, 4.0, 12.0)] + [0.0] * (numel - 3)
    assert _norm(sums) == 13.0 * num_ranks


def _partitions(
    gradients: list[torch.Tensor], num_ranks: int, stays: bool, monkeypatch: pytest.MonkeyPatch
) -> list[torch.Tensor]:
    """Those of all ranks after the second step."""
    assert dist.group.WORLD is not None
    weights = torch.zeros(2 * num_ranks * math.ceil(3 / (2 * num_ranks)))
    partitions = []
    for rank in range(num_ranks):
        parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
        offsets = dict(zip(parameters, (0, 2), strict=True))
        with _as_rank(rank, num_ranks, monkeypatch), uninitialized_is_nan():
            bucket = _Bucket(offsets, weights, dist.group.WORLD, torch.float32, stays=stays)
            for _ in range(2):
                _take_step(bucket, dict(zip(parameters, gradients, strict=True)))
        partitions.append(bucket.partition)
    return partitions


def _take_step(bucket: _Bucket, gradients: dict[nn.Parameter, torch.Tensor]) -> None:
    for parameter, gradient in gradients.items():
        parameter.grad = gradient.clone()
        bucket.add(parameter)
    bucket.launch()
    bucket.finish()
    bucket.end_pass()
    bucket.end_step()


def _norm(gradient: torch.Tensor) -> float:
    assert dist.group.WORLD is not None
    optimizer, _ = _optimizer(gradient)
    return float(ClippedUpdate(optimizer, 0.0, dist.group.WORLD).run())
