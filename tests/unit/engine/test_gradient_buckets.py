from __future__ import annotations

import torch
from torch import nn

from qwen3next_train.engine.divided_parameters import mark_as_expert
from qwen3next_train.engine.gradient_buckets import bucketed_groups


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
