"""Runs of the loop whose engine is a list of outcomes, for the tests of this package."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from qwen3next_train.checkpoint.background import BackgroundSaver
from qwen3next_train.checkpoint.manager import CheckpointManager
from qwen3next_train.config.schema import CheckpointConfig, Config, LoggingConfig, RunConfig
from qwen3next_train.engine.base import Fragment, StepResult
from qwen3next_train.metrics.sinks import JsonlSink
from qwen3next_train.metrics.throughput import Throughput
from qwen3next_train.parallel.control import ControlGroup, SingleProcess
from qwen3next_train.train.loop import Run
from tests.unit.checkpoint.support import (
    HookedFilesystem,
    fragments_of,
    header,
    names,
    train_state,
)
from tests.unit.model.small_models import small_config


class ScriptedEngine:
    """Steps whose gradients are finite or not."""

    def __init__(self, outcomes: str, *, rank: int = 0, world_size: int = 1) -> None:
        self._outcomes = iter(outcomes)
        self._share = (rank, world_size)
        self.fragments_are_finite = True

    def train_step(self, *arguments: object, **options: object) -> StepResult:
        return StepResult({"loss/lm": 1.0}, skipped=next(self._outcomes) == "x")

    def fragments(self) -> Iterator[Fragment]:
        for fragment in fragments_of(1, *self._share):
            if not self.fragments_are_finite:
                fragment.tensors["master"] = torch.full_like(fragment.tensors["master"], math.nan)
            yield fragment


def run_of(
    path: Path,
    outcomes: str,
    *,
    keep: int = 1,
    interval: int = 1,
    max_failures: int = 2,
    control: ControlGroup | None = None,
    sink: JsonlSink | None = None,
    require_directory: Callable[[], None] = lambda: None,
    filesystem: HookedFilesystem | None = None,
    start: int = 0,
    log: LoggingConfig | None = None,
    async_save: bool = False,
    saving: ControlGroup | None = None,
    has_room: Callable[[int], bool] = lambda num_bytes: True,
) -> Run:
    control = control or SingleProcess()
    config = Config(
        model=small_config(),
        run=RunConfig(steps=start + len(outcomes), max_skipped_steps=3),
        checkpoint=CheckpointConfig(interval=interval, keep=keep, max_failures=max_failures),
        logging=log or LoggingConfig(),
    )
    batch = SimpleNamespace(num_targets=(8,), num_tokens=8, sum_squared_lengths=64)
    checkpoints = CheckpointManager(
        path / "checkpoints", control=saving or control, keep=keep, filesystem=filesystem or HookedFilesystem()
    )
    return Run(
        config=config,
        control=control,
        engine=cast(Any, ScriptedEngine(outcomes, rank=control.rank, world_size=control.world_size)),
        batches=itertools.repeat(cast(Any, [batch])),
        data_wait_s=lambda: 0.0,
        validation=[],
        checkpoints=checkpoints,
        background=BackgroundSaver(
            checkpoints, control=control, device=torch.device("cpu"), enabled=async_save, has_room=has_room
        ),
        header=header(control.world_size),
        state=replace(train_state(start), skipped_steps=0),
        sinks=[] if sink is None else [sink],
        progress=lambda step: None,
        sync_metrics=sink.sync if sink else lambda: None,
        require_directory=require_directory,
        record_save=lambda step: None,
        throughput=Throughput(None, 1),
        stop=cast(Any, SimpleNamespace(requested=None, defer=lambda: None)),
    )


def steps(path: Path) -> list[int]:
    return sorted(int(name.removeprefix("step_")) for name in names(path / "checkpoints") if name.startswith("step_"))


class Full(HookedFilesystem):
    """A disk without space for checkpoints while ``full`` is set."""

    def __init__(self) -> None:
        super().__init__(self._refuse)
        self.full = True

    def _refuse(self, name: str, arguments: tuple[object, ...]) -> None:
        if self.full and name == "write":
            raise OSError(28, "No space left on device")


class FullSink(JsonlSink):
    """Metrics on a disk that is full from one step to another."""

    def __init__(self, path: Path, full: range) -> None:
        super().__init__(path, resume_step=0)
        self._full = full

    def log(self, record: Any) -> None:
        self._is_full = record["step"] in self._full
        super().log(record)

    def _write_pending(self) -> None:
        if self._is_full:
            self._report(OSError(28, "No space left on device"))
        else:
            super()._write_pending()
