"""What the wiring says about a resume, and when it refuses wrong kernels."""

from __future__ import annotations

import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch

from qwen3next_train.config.schema import Config, MomentsDtype, OptimizerConfig
from qwen3next_train.errors import KernelUnavailable
from qwen3next_train.parallel.control import Json, SingleProcess
from qwen3next_train.parallel.process_groups import ProcessContext
from qwen3next_train.topology import Topology
from qwen3next_train.train import build
from qwen3next_train.train.build import _build_engine, _log_other_moments
from qwen3next_train.train.restore import Restored
from tests.unit.model.small_models import CPU, cpu_kernels, small_config


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


class Start:
    """A start with another engine and another norm; ``events`` is what happened, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.wrong = False
        self.engine_fails = False
        self._checking = threading.Event()
        kernels = cpu_kernels()
        choices = [
            replace(choice, backend="triton") if choice.operation == "gated_rms_norm" else choice
            for choice in kernels.choices
        ]
        selected = replace(kernels, gated_rms_norm=self._norm, choices=tuple(choices))
        monkeypatch.setattr(build, "select_kernels", lambda *arguments, **options: selected)
        module = ModuleType("zero_engine")
        module.ZeroEngine = self._engine  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "qwen3next_train.engine.zero_engine", module)

    def build(self) -> None:
        control = SimpleNamespace(gather_json=self._gather)
        alone = SingleProcess()
        context = ProcessContext(0, 1, 0, 1, CPU, cast(Any, control), alone, alone, ())
        initial = SimpleNamespace(read=None, path=Path("weights"))
        restored = Restored(cast(Any, None), None, cast(Any, initial))
        _build_engine(Config(model=small_config()), Topology(), context, cast(Any, None), restored)

    def _norm(self, x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
        self._checking.set()
        return cpu_kernels().gated_rms_norm(x, gate, weight, eps=eps) * (2 if self.wrong else 1)

    def _engine(self, config: Config, **parts: object) -> SimpleNamespace:
        # The checks go on while the engine is built, not before or after it.
        assert self._checking.wait(60)
        self.events.append("built")
        if self.engine_fails:
            raise RuntimeError("no room")
        return SimpleNamespace(load_state=lambda read, step: self.events.append("loaded"))

    def _gather(self, value: Json) -> list[Json]:
        assert threading.current_thread() is threading.main_thread()
        self.events.append("gathered")
        return [value]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Start:
    return Start(monkeypatch)


def test_kernels_are_checked_while_the_engine_is_built_and_before_weights_are_read(start: Start) -> None:
    start.build()
    assert start.events == ["built", "gathered", "loaded"]


def test_wrong_kernels_are_refused_before_weights_are_read(start: Start) -> None:
    start.wrong = True
    with pytest.raises(KernelUnavailable, match=r"^kernels\.fused: gated_rms_norm by triton is off plain torch by "):
        start.build()
    assert start.events == ["built", "gathered"]


def test_an_engine_that_cannot_be_built_says_so_and_no_thread_is_left(start: Start) -> None:
    threads = threading.active_count()
    start.engine_fails = True
    with pytest.raises(RuntimeError, match=r"^no room$"):
        start.build()
    assert start.events == ["built"]
    assert threading.active_count() == threads
