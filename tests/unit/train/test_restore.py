"""Where a run starts, and which histories speak against starting."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from qwen3next_train.checkpoint.manifest import config_hash
from qwen3next_train.config.schema import CheckpointConfig, Config, RunConfig, ScheduleConfig
from qwen3next_train.errors import CheckpointError, ConfigError
from qwen3next_train.parallel.control import SingleProcess
from qwen3next_train.train.restore import Restored, due_steps, restore_state
from qwen3next_train.train.run_directory import RunDirectory
from tests.unit.checkpoint.support import collected_log, header, manager, rewrite_manifest, train_state


def config_of(steps: int = 20, *, interval: int = 5, kind: Any = "constant") -> Config:
    return Config(
        run=RunConfig(steps=steps),
        checkpoint=CheckpointConfig(interval=interval),
        schedule=ScheduleConfig(kind=kind),
    )


def trained(path: Path, *, logged: int, saved: tuple[int, ...] = (), config: Config | None = None) -> None:
    """A run directory as a run leaves it."""
    config = config or config_of()
    run_dir = RunDirectory(path, rank=0)
    run_dir.open()
    run_dir.record_attempt(config, layout={}, workload={}, wandb_id="abcd1234", command=[], step=0)
    run_dir.metrics_path.write_text("".join(f'{{"step": {step}}}\n' for step in range(1, logged + 1)))
    checkpoints = manager(run_dir.checkpoints_path, keep=9)
    for step in saved:
        checkpoints.save(
            step=step,
            fragments=[],
            train_state=replace(train_state(step)),
            rank_tensors={},
            header=replace(header(), parameters=(), config=config.model_dump(mode="json")),
        )
        run_dir.record_save(step)
    run_dir.close()


def restore(path: Path, config: Config | None = None) -> Restored:
    run_dir = RunDirectory(path, rank=0)
    run_dir.open()
    try:
        prepared = cast(Any, SimpleNamespace(fingerprint="abc123"))
        return restore_state(
            config or config_of(), manager(run_dir.checkpoints_path), prepared, run_dir, SingleProcess()
        )
    finally:
        run_dir.close()


def test_a_new_run_and_one_that_goes_on(tmp_path: Path) -> None:
    assert restore(tmp_path).state.step == 0
    trained(tmp_path, logged=12, saved=(5, 10))
    with collected_log() as lines:
        restored = restore(tmp_path)
    assert (restored.state.step, restored.state.wandb_id, lines) == (10, "w1", [])


def test_a_run_killed_before_its_first_checkpoint_starts_over(tmp_path: Path) -> None:
    for logged in (0, 1, 5, 19):
        trained(tmp_path, logged=logged)
        with collected_log() as lines:
            assert restore(tmp_path).state.step == 0
        assert lines == []
        assert restore(tmp_path).state.wandb_id == ("abcd1234")


@pytest.mark.parametrize("lose", [lambda path: shutil.rmtree(path), lambda path: [shutil.rmtree(path), path.mkdir()]])
@pytest.mark.parametrize("without", [(), ("metrics.jsonl",), ("run.json",), ("config.yaml",)])
def test_checkpoints_that_were_deleted_are_not_started_over(
    tmp_path: Path, lose: Any, without: tuple[str, ...]
) -> None:
    trained(tmp_path, logged=12, saved=(5, 10))
    lose(tmp_path / "checkpoints")
    for name in without:
        (tmp_path / name).unlink()
    before = {each.name for each in tmp_path.iterdir()}
    with pytest.raises(CheckpointError) as caught:
        restore(tmp_path)
    logged = 0 if "metrics.jsonl" in without else 12
    assert str(caught.value) == (
        f"run.dir: {tmp_path}/checkpoints has no checkpoint, but one of step 10 was saved and metrics.jsonl has rows "
        f"up to step {logged}; restore the checkpoints, or choose another run.dir to start over"
    )
    assert caught.value.exit_code == 65
    assert {each.name for each in tmp_path.iterdir()} == before
    if logged:
        assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 12


def test_without_run_json_a_row_behind_the_first_interval_tells(tmp_path: Path) -> None:
    trained(tmp_path, logged=5)
    (tmp_path / "run.json").unlink()
    assert restore(tmp_path).state.step == 0, "the row of the step that would have been saved next"
    trained(tmp_path, logged=6)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"but one of step 5 was saved and metrics\.jsonl has rows up to step 6"):
        restore(tmp_path)
    trained(tmp_path, logged=6, config=config_of(interval=0))
    (tmp_path / "run.json").write_text("{}")
    assert restore(tmp_path, config_of(interval=0)).state.step == 0


def test_a_newest_checkpoint_that_is_gone_or_damaged_is_said(tmp_path: Path) -> None:
    trained(tmp_path, logged=12, saved=(5, 10))
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000010")
    with collected_log() as lines:
        assert restore(tmp_path).state.step == 5
    assert lines == [
        "run.dir: the checkpoint of step 10 is gone or damaged; the run goes on from step 5 and does the steps between "
        "again"
    ]


@pytest.mark.parametrize("kind", ["constant", "cosine", "wsd"])
def test_fewer_steps_than_done_are_said_as_what_they_are(tmp_path: Path, kind: str) -> None:
    trained(tmp_path, logged=10, saved=(5, 10), config=config_of(10, kind=kind))
    with pytest.raises(ConfigError) as caught:
        restore(tmp_path, config_of(9, kind=kind))
    assert str(caught.value) == (
        f"run.steps: 9 are fewer than the 10 steps that run.dir has done already ({tmp_path}/checkpoints); give 10 or "
        "more, or choose another run.dir"
    )
    assert restore(tmp_path, config_of(10, kind=kind)).state.step == 10


def test_steps_that_must_have_been_logged(tmp_path: Path) -> None:
    trained(tmp_path, logged=12, saved=(5, 10))
    restored = restore(tmp_path)
    info = json.loads((tmp_path / "run.json").read_text())
    assert due_steps(info, restored) == [range(1, 11)]
    assert due_steps({}, restored) == [range(10, 11)], "the checkpoint's configuration tells at least the last one"


HOSTILE_CONFIGURATIONS: list[Any] = [
    {"checkpoint": 5, "logging": [], "run": None, "optimizer": "x", "parallel": {"recompute": 7}, "model": []},
    {"logging": {"interval": "1"}, "checkpoint": {"interval": {}}, "schedule": {"kind": ["wsd"]}},
    {"optimizer": {"lr": "x" * 100_000}},
    {"optimizer": {"lr": ["y"] * 50_000}},
    {"model": {"layer_types": {"a": [[[[]]]]}}},
    {"run": {"steps": {"a": 1}}, "": 0, "a.b": {"c.d": 1}},
    {"run": {"steps": 10**300}},
    {"run": {"seed": json.loads("[" * 500 + "]" * 500)}},
]


@pytest.mark.parametrize("stored", HOSTILE_CONFIGURATIONS)
def test_a_hostile_configuration_of_a_checkpoint_is_one_short_line(tmp_path: Path, stored: Any) -> None:
    trained(tmp_path, logged=10, saved=(10,))
    (tmp_path / "config.yaml").unlink()
    rewrite_manifest(
        tmp_path / "checkpoints" / "step_00000010" / "MANIFEST.json",
        lambda fields: fields.update(config=stored, config_xxh3_128=config_hash(stored)),
    )
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        due_steps({}, restore(tmp_path, config_of(kind="wsd")))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
