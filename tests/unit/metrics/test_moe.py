import pytest
import torch

from qwen3next_train.metrics.moe import balance_metrics
from qwen3next_train.metrics.names import is_metric_name

COUNTS_LE = [[4, 4, 4, 4], [10, 2, 4, 0], [0, 0, 0, 12]]


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.int32])
def test_counts_by_hand(dtype):
    metrics = balance_metrics(torch.tensor(COUNTS_LE, dtype=dtype), torch.tensor([1.0, 0.5, 0.0]), with_layers=True)
    assert metrics == {
        "moe/max_violation": 3.0,
        "moe/dead_experts": 4,
        "moe/router_entropy": 0.5,
        "moe/layer_00/max_violation": 0.0,
        "moe/layer_00/dead_experts": 0,
        "moe/layer_00/router_entropy": 1.0,
        "moe/layer_01/max_violation": 1.5,
        "moe/layer_01/dead_experts": 1,
        "moe/layer_01/router_entropy": 0.5,
        "moe/layer_02/max_violation": 3.0,
        "moe/layer_02/dead_experts": 3,
        "moe/layer_02/router_entropy": 0.0,
    }
    assert all(is_metric_name(name) for name in metrics)


def test_layers_only_when_asked():
    metrics = balance_metrics(torch.tensor(COUNTS_LE), torch.zeros(3), with_layers=False)
    assert sorted(metrics) == ["moe/dead_experts", "moe/max_violation", "moe/router_entropy"]


def test_layer_without_tokens():
    metrics = balance_metrics(torch.zeros(1, 8), torch.zeros(1), with_layers=False)
    assert metrics == {"moe/max_violation": 0.0, "moe/dead_experts": 8, "moe/router_entropy": 0.0}


def test_large_counts_are_exact():
    counts = torch.tensor([[2**40 + 1, 2**40 - 1]])
    assert balance_metrics(counts, torch.zeros(1), with_layers=False)["moe/max_violation"] == 2**-40


def test_inputs_are_left_alone():
    counts = torch.tensor(COUNTS_LE)
    balance_metrics(counts, torch.zeros(3), with_layers=True)
    assert counts.tolist() == COUNTS_LE
