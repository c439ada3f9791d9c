"""Size of a model and work of a step, as ``plan`` and ``run.json`` give them."""

from __future__ import annotations

from qwen3next_train.accounting.workload import count_parameters, workload_of
from tests.unit.accounting.shapes import QWEN3_NEXT_80B, QWEN3_NEXT_80B_WITHOUT_MTP, TINY
from tests.unit.planner.configs import config_80b


def test_parameter_goldens() -> None:
    """The published shape, with and without its MTP layer; a token's share has both embeddings and no MTP."""
    with_mtp, without = count_parameters(QWEN3_NEXT_80B), count_parameters(QWEN3_NEXT_80B_WITHOUT_MTP)
    assert with_mtp.total == 81_324_862_720
    assert without.total == 79_674_391_296
    assert with_mtp.active == without.active == 3_874_929_408
    assert with_mtp.by_part["mtp"] == with_mtp.total - without.total
    assert sum(with_mtp.by_part.values()) == with_mtp.total


def test_parameters_by_hand() -> None:
    """Two of four experts idle in two layers."""
    counted = count_parameters(TINY)
    assert counted.by_part["experts"] == 2 * 4 * 3 * 8 * 6
    assert counted.by_part["embedding"] == counted.by_part["head"] == 88
    assert counted.active == counted.total - counted.by_part["mtp"] - 2 * 2 * 3 * 8 * 6


def test_a_step_of_the_80b() -> None:
    """Full rows, one document each."""
    workload = workload_of(config_80b())
    assert workload.num_tokens == 256 * 4096
    assert workload.as_json() == {
        "parameters": {
            "total": 81_324_862_720,
            "active": 3_874_929_408,
            "by_part": workload.parameters.by_part,
        },
        "flops": {
            "per_token": 25_437_745_152,
            "per_step": 26_673_409_060_503_552,
            "by_part": workload.flops_by_part,
        },
        "flops_megatron": {"per_step": 2.629781417046835e16},
    }
