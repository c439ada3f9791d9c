"""What DeepSpeed says by itself is not said: our optimizer is known to it, and a skipped step has a line of ours."""

from __future__ import annotations

import logging

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero import utils as zero_utils
from deepspeed.utils import logger

from qwen3next_train.config.schema import OptimizerConfig
from qwen3next_train.engine.deepspeed_patches import quiet_start
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
