"""Every shipped configuration: the model that is built is the parameter table, name by name and shape by shape."""

from __future__ import annotations

import pytest
import torch

from qwen3next_train.accounting.workload import count_parameters
from qwen3next_train.config.load import load_config
from qwen3next_train.config.presets import shipped_folder
from qwen3next_train.config.schema import ModelConfig
from qwen3next_train.model.qwen3_next import Qwen3NextForCausalLM
from qwen3next_train.parameters import parameter_table
from tests.unit.model.small_models import cpu_kernels

SHIPPED = sorted(path.name for path in shipped_folder().glob("*.yaml"))


def shipped(name: str) -> ModelConfig:
    return load_config([shipped_folder() / name]).config.model


def build_on_meta(config: ModelConfig) -> Qwen3NextForCausalLM:
    with torch.device("meta"):
        return Qwen3NextForCausalLM(config, kernels=cpu_kernels())


@pytest.mark.parametrize("depths", [0, 1, 2])
@pytest.mark.parametrize("name", SHIPPED)
def test_built_model_is_the_parameter_table(name: str, depths: int) -> None:
    config = shipped(name).model_copy(update={"mtp_num_layers": depths})
    model = build_on_meta(config)
    table = parameter_table(config)
    assert [(key, tuple(parameter.shape)) for key, parameter in model.named_parameters()] == [
        (spec.name, spec.shape) for spec in table
    ]
    assert all(parameter.is_meta for parameter in model.parameters()), "80 B parameters must not be allocated"
    assert not list(model.buffers())
    counted = count_parameters(config)
    assert counted.total == sum(parameter.numel() for parameter in model.parameters())
    assert sum(counted.by_part.values()) == counted.total


def test_80b_totals() -> None:
    """The published model, without and with its MTP layer."""
    config = shipped("qwen3next_80b.yaml")
    totals = [
        sum(parameter.numel() for parameter in build_on_meta(each).parameters())
        for each in (config.model_copy(update={"mtp_num_layers": 0}), config)
    ]
    assert totals == [79_674_391_296, 81_324_862_720]


@pytest.mark.parametrize("name", SHIPPED)
def test_active_parameters_are_those_one_token_uses(name: str) -> None:
    """Counted on the built model: all but MTP and the experts a token is not sent to."""
    config = shipped(name)
    active = 0
    for key, parameter in build_on_meta(config).named_parameters():
        if key.startswith("mtp."):
            continue
        share = config.num_experts_per_tok if ".experts." in key else config.num_experts
        active += parameter.numel() * share // config.num_experts
    assert count_parameters(config).active == active
