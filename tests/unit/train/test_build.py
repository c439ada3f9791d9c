"""What the wiring says about a resume."""

from __future__ import annotations

import pytest

from qwen3next_train.config.schema import Config, MomentsDtype, OptimizerConfig
from qwen3next_train.train.build import _log_other_moments


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ("fp32", "fp32", ""),
        ("bf16", "fp32", "optimizer.moments_dtype was bf16, now fp32: the moments go on in it\n"),
        ("fp32", "bf16", "optimizer.moments_dtype was fp32, now bf16: the moments go on in it\n"),
    ],
)
def test_another_dtype_of_the_moments_is_said(
    capsys: pytest.CaptureFixture[str], before: MomentsDtype, now: MomentsDtype, said: str
) -> None:
    old, new = (Config(optimizer=OptimizerConfig(moments_dtype=dtype)) for dtype in (before, now))
    _log_other_moments(old.model_dump(), new)
    assert capsys.readouterr().err == said
