import pytest

from qwen3next_train.errors import ConfigError
from qwen3next_train.topology import Topology


def test_experts_of_all_ranks_of_an_expert_group_partition_the_experts() -> None:
    owned = [list(Topology(8, rank, 4).local_experts(16)) for rank in range(8)]
    assert [expert for experts in owned[:4] for expert in experts] == list(range(16))
    assert owned[:4] == owned[4:]
    assert Topology(8, 5, 4).expert_parallel_rank == 1


def test_size_that_does_not_divide_the_world_is_refused_with_both_values() -> None:
    with pytest.raises(ConfigError, match=r"expert_parallel_size: 3 does not divide the world size 8"):
        Topology(8, 0, 3)


def test_ranks_of_a_context_group_share_rows_and_have_slices_in_order() -> None:
    ranks = [Topology(8, rank, 4, context_parallel_size=2) for rank in range(8)]
    assert [rank.data_parallel_rank for rank in ranks] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [rank.context_parallel_rank for rank in ranks] == [0, 1, 0, 1, 0, 1, 0, 1]
    assert {rank.data_parallel_size for rank in ranks} == {4}
    assert ranks[0].context_parallel_groups == [range(2), range(2, 4), range(4, 6), range(6, 8)]


def test_context_size_that_does_not_divide_the_world_is_refused_with_both_values() -> None:
    with pytest.raises(ConfigError, match=r"context_parallel_size: 4 does not divide the world size 6"):
        Topology(6, 0, context_parallel_size=4)


def test_size_that_does_not_divide_the_experts_is_refused_with_both_values() -> None:
    with pytest.raises(ConfigError, match=r"expert_parallel_size: 4 does not divide model.num_experts 6"):
        Topology(4, 0, 4).local_experts(6)


def test_tensor_groups_lie_inside_of_the_groups_that_share_rows():
    ranks = [Topology(8, rank, context_parallel_size=2, tensor_parallel_size=2) for rank in range(8)]
    assert [rank.data_parallel_rank for rank in ranks] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [rank.context_parallel_rank for rank in ranks] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert [rank.tensor_parallel_rank for rank in ranks] == [0, 1, 0, 1, 0, 1, 0, 1]
    assert ranks[0].data_parallel_size == 2
    assert ranks[0].row_groups == [range(4), range(4, 8)]
    assert ranks[0].context_parallel_groups == [range(0, 4, 2), range(1, 4, 2), range(4, 8, 2), range(5, 8, 2)]
    assert ranks[0].tensor_parallel_groups == [range(2), range(2, 4), range(4, 6), range(6, 8)]
    assert ranks[0].head_holders(2) == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_neighbours_share_a_head_where_there_are_fewer_than_ranks():
    ranks = [Topology(8, rank, tensor_parallel_size=4) for rank in range(8)]
    assert ranks[0].head_shares(2) == 2
    assert [rank.head_share(2) for rank in ranks] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert [list(group) for group in ranks[0].head_sets(2)] == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert ranks[0].head_holders(2) == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_slices_and_heads_together_have_to_fit_the_world():
    with pytest.raises(ConfigError, match=r"tensor_parallel_size: 2 x parallel.context_parallel_size 4 does not"):
        Topology(4, 0, context_parallel_size=4, tensor_parallel_size=2)
