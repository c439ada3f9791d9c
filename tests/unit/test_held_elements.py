from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen3next_train.held_elements import Runs, held_runs, held_shape, runs_of_range
from qwen3next_train.parameters import parameter_table
from qwen3next_train.topology import Topology
from tests.unit.model.small_models import small_config

TABLE = parameter_table(small_config(linear_num_key_heads=4, linear_num_value_heads=8))


@given(length=st.integers(1, 4), count=st.integers(1, 5), data=st.data())
def test_a_part_of_runs_has_their_elements_in_order(length: int, count: int, data: st.DataObject) -> None:
    runs = Runs(3, length, count, 7 if count > 1 else 0)
    values = torch.arange(50)
    elements = runs.of(values).flatten()
    begin = data.draw(st.integers(0, runs.numel - 1))
    end = data.draw(st.integers(begin + 1, runs.numel))
    parts = runs.part(begin, end)
    assert len(parts) <= 3
    assert torch.cat([part.of(values).flatten() for part in parts]).equal(elements[begin:end])
    assert all(part.stride == 0 or part.count > 1 for part in parts)
    assert runs.stop == elements[-1] + 1


@pytest.mark.parametrize(("tensor", "expert"), [(1, 2), (2, 1), (2, 2), (4, 1), (4, 3)])
def test_every_element_is_held_and_as_often_as_its_group_says(tensor: int, expert: int) -> None:
    """Two key and value heads: of four ranks that divide heads each has one of them, and two have the same."""
    world_size = 12
    ranks = [
        Topology(world_size, rank, expert, tensor_parallel_size=tensor, context_parallel_size=3)
        for rank in range(world_size)
    ]
    for spec in TABLE:
        held: Counter[int] = Counter()
        for topology in ranks:
            elements = [runs.of(torch.arange(spec.numel)).flatten() for runs in held_runs(spec, topology)]
            assert sum(map(len, elements)) == torch.Size(held_shape(spec, topology)).numel()
            held.update(torch.cat(elements).tolist())
        shares = expert if spec.expert else ranks[0].head_shares(spec.heads.count) if spec.heads else 1
        assert set(held) == set(range(spec.numel)), spec.name
        assert set(held.values()) == {world_size // shares}, spec.name


def test_a_range_of_a_convolution_lies_in_the_blocks_of_its_channels() -> None:
    (conv,) = (spec for spec in TABLE if spec.name == "model.layers.0.linear_attn.conv1d.weight")
    # Channels of q, k (4 heads of 8) and v (8 heads of 12), 4 taps each; rank 1 of two.
    held = held_runs(conv, Topology(2, 1, tensor_parallel_size=2))
    assert held == (Runs(64, 64), Runs(192, 64), Runs(448, 192))
    assert list(runs_of_range(held, 60, 132)) == [(0, Runs(124, 4)), (4, Runs(192, 64)), (68, Runs(448, 4))]


def test_a_range_of_an_output_projection_is_columns_of_its_rows() -> None:
    (out,) = (spec for spec in TABLE if spec.name == "model.layers.0.linear_attn.out_proj.weight")
    assert out.shape == (32, 96)
    held = held_runs(out, Topology(2, 1, tensor_parallel_size=2))
    assert held == (Runs(48, 48, 32, 96),)
    assert list(runs_of_range(held, 40, 200)) == [
        (0, Runs(88, 8)),
        (8, Runs(144, 48, 3, 96)),
        (152, Runs(432, 8)),
    ]
