"""Profiles of steps and snapshots of memory, in files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from qwen3next_train.config.schema import Config, LoggingConfig, ProfileConfig, RunConfig
from qwen3next_train.engine import step_profile
from qwen3next_train.engine.step_profile import new_profiler
from qwen3next_train.train.profiling import StepProfiler, open_profiler, snapshot_when_out_of_memory

CPU = torch.device("cpu")


def profiler_of(folder: Path, steps: range, *, rank: int = 0) -> StepProfiler:
    return StepProfiler(steps, folder, rank=rank, device=CPU, with_memory=False)


def work(profiler: StepProfiler, steps: range) -> None:
    """As many products in a step as its number."""
    for step in steps:
        profiler.before(step)
        for _ in range(step):
            torch.ones(2, 2) @ torch.ones(2, 2)
        profiler.after(step)


def num_products(path: Path) -> int:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return sum(event.get("name") == "aten::mm" for event in json.load(file)["traceEvents"])


def context_of(device: torch.device = CPU, rank: int = 0) -> Any:
    return SimpleNamespace(device=device, rank=rank)


def config_of(**settings: Any) -> Config:
    return Config(run=RunConfig(steps=20), logging=LoggingConfig(profile=ProfileConfig(**settings)))


def test_the_steps_that_are_named_are_profiled_and_no_others(tmp_path: Path) -> None:
    work(profiler_of(tmp_path / "profile", range(3, 5), rank=1), range(1, 8))
    names = sorted(path.name for path in (tmp_path / "profile").iterdir())
    assert names == ["steps_3-4_rank_1.trace.json.gz", "steps_3-4_rank_1.txt"]
    assert num_products(tmp_path / "profile" / names[0]) == 3 + 4
    lines = (tmp_path / "profile" / names[1]).read_text().splitlines()
    assert lines[0] == "steps 3-4 of rank 1 on CPU"
    assert next(line.split()[1] for line in lines if line.endswith("  aten::mm")) == "3.5"


def test_a_run_that_ends_within_the_steps_leaves_what_there_is(tmp_path: Path) -> None:
    profiler = profiler_of(tmp_path, range(2, 9))
    # Resumed at step 3.
    work(profiler, range(3, 5))
    profiler.before(5)
    profiler.close()
    profiler.close()
    assert num_products(tmp_path / "steps_3-4_rank_0.trace.json.gz") == 7


def test_a_run_that_ends_in_the_first_of_the_steps_leaves_nothing(tmp_path: Path) -> None:
    profiler = profiler_of(tmp_path / "profile", range(2, 9))
    profiler.before(2)
    profiler.close()
    assert not (tmp_path / "profile").exists()


def test_a_profile_that_cannot_be_written_costs_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "profile").touch()
    work(profiler_of(tmp_path / "profile", range(1, 2)), range(1, 4))
    assert f"not written to {tmp_path}/profile (File exists)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "rank", "first_step", "profiles"),
    [
        ({}, 0, 1, False),
        ({"steps": "10-12"}, 0, 1, True),
        ({"steps": "10-12"}, 0, 12, True),
        ({"steps": "10-12"}, 0, 13, False),
        ({"steps": "10-12"}, 1, 1, False),
        ({"steps": "10-12", "all_ranks": True}, 1, 1, True),
    ],
)
def test_who_profiles(tmp_path: Path, settings: dict[str, Any], rank: int, first_step: int, profiles: bool) -> None:
    opened = open_profiler(config_of(**settings), context_of(rank=rank), tmp_path, first_step=first_step)
    assert (opened is not None) == profiles


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What CUDA's allocator is asked for, in order."""
    asked: list[object] = []
    stand_in = SimpleNamespace(
        _record_memory_history=lambda **options: asked.append(options),
        _dump_snapshot=lambda path: (asked.append(path), Path(path).write_bytes(b"snapshot")),
    )
    monkeypatch.setattr(torch.cuda, "memory", cast(Any, stand_in))
    return asked


def test_memory_is_written_down_when_it_runs_out(tmp_path: Path, memory: list[object]) -> None:
    config, context = config_of(memory=["out_of_memory"]), context_of(torch.device("cuda"), rank=2)
    with pytest.raises(torch.OutOfMemoryError), snapshot_when_out_of_memory(config, context, tmp_path):
        raise torch.OutOfMemoryError("CUDA out of memory")
    path = tmp_path / "profile" / "memory_out_of_memory_rank_2.pickle"
    assert memory == [{"max_entries": 100_000}, str(path)]
    assert path.read_bytes() == b"snapshot"


@pytest.mark.parametrize("goes_on", [True, False])
def test_memory_of_the_profiled_steps_is_written_down_after_the_last(
    tmp_path: Path, memory: list[object], monkeypatch: pytest.MonkeyPatch, goes_on: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    monkeypatch.setattr(step_profile, "new_profiler", lambda device: new_profiler(CPU))
    profiler = StepProfiler(
        range(2, 4),
        tmp_path,
        rank=0,
        device=torch.device("cuda"),
        with_memory=True,
        goes_on_recording=goes_on,
    )
    work(profiler, range(1, 6))
    snapshot = str(tmp_path / "memory_steps_2-3_rank_0.pickle")
    assert memory == ([snapshot] if goes_on else [{"max_entries": 100_000}, snapshot, {"enabled": None}])
    assert (tmp_path / "steps_2-3_rank_0.txt").read_text().startswith("steps 2-3 of rank 0 on GPU\n")


@pytest.mark.parametrize(
    ("settings", "device"),
    [({}, "cuda"), ({"steps": "3", "memory": ["steps"]}, "cuda"), ({"memory": ["out_of_memory"]}, "cpu")],
)
def test_memory_is_not_recorded_where_nobody_asks_or_there_is_no_gpu(
    tmp_path: Path, memory: list[object], settings: dict[str, Any], device: str
) -> None:
    context = context_of(torch.device(device))
    with pytest.raises(MemoryError), snapshot_when_out_of_memory(config_of(**settings), context, tmp_path):
        raise MemoryError
    assert memory == []
    assert list(tmp_path.iterdir()) == []


def test_another_failure_leaves_no_snapshot(tmp_path: Path, memory: list[object]) -> None:
    config, context = config_of(memory=["out_of_memory"]), context_of(torch.device("cuda"))
    with pytest.raises(ValueError, match="bug"), snapshot_when_out_of_memory(config, context, tmp_path):
        raise ValueError("bug")
    assert memory == [{"max_entries": 100_000}]
