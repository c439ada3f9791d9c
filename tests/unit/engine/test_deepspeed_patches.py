"""What DeepSpeed says by itself is not said: our optimizer is known to it, and a skipped step has a line of ours."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from deepspeed.runtime import engine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero import partition_parameters, stage3, stage_1_and_2
from deepspeed.runtime.zero import utils as zero_utils
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.utils import logger

from qwen3next_train.config.schema import OptimizerConfig
from qwen3next_train.engine.deepspeed_patches import (
    gather_one_by_one,
    order_by_one_stream,
    patched_optimizers,
    quiet_start,
)
from qwen3next_train.engine.gradient_buckets import GradientBucketOptimizer
from qwen3next_train.engine.partitioned_parameters import PartitionedParameterOptimizer
from qwen3next_train.kernels.adamw import AdamWUpdate, adamw_update_reference
from qwen3next_train.optim.adamw import build_adamw


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lines of DeepSpeed's logger."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    monkeypatch.setattr(logger, "handlers", [handler])
    return lines


@pytest.mark.parametrize("update", [None, adamw_update_reference])
def test_our_optimizers_are_known(update: AdamWUpdate | None) -> None:
    quiet_start()
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))]}]
    optimizer = build_adamw(groups, OptimizerConfig(), fused=False, update=update)
    assert type(optimizer) in zero_utils.ZERO_SUPPORTED_OPTIMIZERS


def test_a_skipped_step_is_not_said_by_deepspeed(said: list[str]) -> None:
    quiet_start()
    logger.warning("heard")
    scaler = LossScaler(scale=1.0)
    scaler.update_scale(overflow=True)
    assert said == ["heard"]
    assert scaler.loss_scale == 1.0


def test_weights_are_gathered_one_by_one_in_one_order_on_all_ranks() -> None:
    gathered: list[tuple[int, dict[str, bool]]] = []
    arrived: list[int] = []

    def gather(parameters: list[SimpleNamespace], **settings: bool) -> SimpleNamespace:
        (parameter,) = parameters
        gathered.append((parameter.ds_id, settings))
        return SimpleNamespace(wait=lambda **_: arrived.append(parameter.ds_id))

    parameters = [SimpleNamespace(ds_id=number, all_gather_coalesced=gather) for number in (4, 2, 7)]
    gather_one_by_one(parameters)
    handle = parameters[0].all_gather_coalesced(parameters, quantize=False)
    assert gathered == [(number, {"quantize": False}) for number in (2, 4, 7)]
    assert arrived == []
    handle.wait()
    assert arrived == [2, 4, 7]


def test_what_a_rank_has_to_itself_is_gathered_without_a_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet_start()
    monkeypatch.setattr(partition_parameters, "get_accelerator", lambda: pytest.fail("asked for the device"))
    kept = torch.arange(6.0)
    parameters = [
        SimpleNamespace(ds_tensor=kept, ds_shape=(2, 3), ds_status=ZeroParamStatus.NOT_AVAILABLE, data=None)
        for _ in range(2)
    ]
    handle = partition_parameters._no_gather_coalesced(parameters)
    assert all(parameter.ds_status == ZeroParamStatus.INFLIGHT for parameter in parameters)
    handle.wait(handle_dependency=True)
    for parameter in parameters:
        assert parameter.ds_status == ZeroParamStatus.AVAILABLE
        assert parameter.data.shape == (2, 3)
        assert parameter.data.data_ptr() == kept.data_ptr()
    # Of two weights gathered together the first may be released before the second is asked for.
    parameters[0].ds_status = ZeroParamStatus.NOT_AVAILABLE
    handle.wait()
    assert parameters[0].ds_status == ZeroParamStatus.NOT_AVAILABLE


def test_stage_3_has_the_host_wait_for_nothing_that_one_stream_orders() -> None:
    """An engine of another stage behind it in the same process gets DeepSpeed's own answers again."""
    accelerator = CUDA_Accelerator()
    asked = (accelerator.handles_memory_backpressure, accelerator.resolves_data_dependency)
    assert [ask() for ask in asked] == [False, False]
    for is_ordered in (True, True, False, False):
        order_by_one_stream(accelerator, is_ordered=is_ordered)
        answers = [accelerator.handles_memory_backpressure(), accelerator.resolves_data_dependency()]
        assert answers == [is_ordered] * 2


def test_deepspeed_builds_our_optimizers_where_it_is_told_to_and_its_own_elsewhere() -> None:
    """Its engine imports that of stage 3 when it builds one, and has imported the others."""

    def built() -> tuple[type, type]:
        return engine.DeepSpeedZeroOptimizer, stage3.DeepSpeedZeroOptimizer_Stage3

    original = (stage_1_and_2.DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3)
    assert built() == original
    with patched_optimizers(GradientBucketOptimizer, PartitionedParameterOptimizer):
        assert built() == (GradientBucketOptimizer, PartitionedParameterOptimizer)
    assert built() == original
