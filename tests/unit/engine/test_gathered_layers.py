"""Under ZeRO-3 a decoder layer is one unit: its weights travel together, and ahead of their use."""

from __future__ import annotations

from typing import Any

import pytest
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn

from qwen3next_train.accounting import memory
from qwen3next_train.accounting.memory import stage3_limits
from qwen3next_train.config.schema import Config
from qwen3next_train.model.block import DecoderLayer
from qwen3next_train.parallel.process_groups import ProcessContext
from tests.distributed.engine import build_engine
from tests.distributed.test_layout_equality import small_config
from tests.unit.engine.test_zero_engine import _step

pytestmark = pytest.mark.slow


def _config(*recompute: str, mtp_num_layers: int = 1) -> Config:
    """Four layers and those of MTP, and four micro-batches a step."""
    values = small_config(micro_batch_size=1).model_dump()
    types = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
    values["model"] |= {"num_hidden_layers": 4, "layer_types": types, "mtp_num_layers": mtp_num_layers}
    values["parallel"] |= {"zero_stage": 3, "recompute": list(recompute)}
    return Config.model_validate(values)


def _is_there(parameter: Any) -> bool:
    return parameter.ds_status != ZeroParamStatus.NOT_AVAILABLE


@pytest.mark.parametrize("mtp_num_layers", [0, 1])
@pytest.mark.parametrize("recompute", [(), ("layer",)])
def test_the_next_layer_is_gathered_while_one_computes(
    context: ProcessContext, recompute: tuple[str, ...], mtp_num_layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no more than the limits say, which are lowered here so that they matter.

    But for one layer: where MTP's backward pass goes over into the last decoder layer's, DeepSpeed has looked beyond
    that layer while it was still there, and released it afterwards.
    """
    monkeypatch.setattr(memory, "_STAGE3_LIVE_NUMEL", 0)
    config = _config(*recompute, mtp_num_layers=mtp_num_layers)
    engine = build_engine(config, context)
    _step(engine, config, 0)
    partitioned: list[Any] = [p for p in engine._model.parameters() if not vars(p)["ds_persist"]]
    coordinator: Any = engine._engine.optimizer.parameter_offload.get_param_coordinator()
    fetch = coordinator.fetch_sub_module
    ahead: list[bool] = []
    live: list[int] = []

    def noted(module: nn.Module, forward: bool) -> None:
        if isinstance(module, DecoderLayer):
            ahead.append(all(map(_is_there, module.parameters())))
        fetch(module, forward=forward)
        live.append(sum(p.ds_numel for p in partitioned if _is_there(p)))

    monkeypatch.setattr(coordinator, "fetch_sub_module", noted)
    _step(engine, config, 1)
    # Once forward and once backward, and once more to be recomputed.
    assert len(ahead) == 4 * (4 + mtp_num_layers) * (2 + len(recompute))
    assert ahead.count(False) == 4 * mtp_num_layers
    limits = stage3_limits(config.model, expert_parallel_size=1, tensor_parallel_size=1)
    sizes = [p.ds_numel for p in partitioned]
    assert max(live) <= limits.live + limits.layer
    assert max(live) < sum(sizes)


def test_of_a_layer_s_modules_only_the_layer_has_hooks(context: ProcessContext) -> None:
    """Gather, wait for the inputs' gradients, release; gather again, and reduce."""
    model = build_engine(_config(), context)._model
    layers = [module for module in model.modules() if isinstance(module, DecoderLayer)]
    assert len(layers) == 5
    for layer in layers:
        hooks = {
            name: len(module._forward_pre_hooks) + len(module._forward_hooks) + len(module._backward_hooks)
            for name, module in layer.named_modules()
        }
        assert {name: count for name, count in hooks.items() if count} == {"": 5}
