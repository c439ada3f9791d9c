"""What DeepSpeed says by itself is not said: our optimizer is known to it, and a skipped step has a line of ours."""

from __future__ import annotations

import logging

import pytest
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from deepspeed.utils import logger

from qwen3next_train.engine.deepspeed_patches import quiet_start
from qwen3next_train.optim.adamw import OnePassAdamW


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lines of DeepSpeed's logger."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    monkeypatch.setattr(logger, "handlers", [handler])
    return lines


def test_our_optimizer_is_in_the_list_once() -> None:
    for _ in range(2):
        quiet_start()
    assert ZERO_SUPPORTED_OPTIMIZERS.count(OnePassAdamW) == 1


def test_a_skipped_step_is_not_said_by_deepspeed(said: list[str]) -> None:
    quiet_start()
    logger.warning("heard")
    scaler = LossScaler(scale=1.0)
    scaler.update_scale(overflow=True)
    assert said == ["heard"]
    assert scaler.loss_scale == 1.0
