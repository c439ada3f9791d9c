"""Where a run starts, and which histories speak against starting."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from qwen3next_train.checkpoint import discovery
from qwen3next_train.checkpoint.manifest import config_hash
from qwen3next_train.checkpoint.train_state import Lowest
from qwen3next_train.config.schema import (
    CheckpointConfig,
    Config,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
)
from qwen3next_train.data.position import SourcePosition, new_start
from qwen3next_train.data.prepared import PreparedData, PreparedSource
from qwen3next_train.errors import CheckpointError, ConfigError
from qwen3next_train.optim.schedule import Rewarmup
from qwen3next_train.parallel.control import SingleProcess
from qwen3next_train.train.restore import Restored, due_steps, restore_state
from qwen3next_train.train.resume import NEWEST, Resume
from qwen3next_train.train.run_directory import RunDirectory
from qwen3next_train.train.start import start_record
from tests.unit.checkpoint.support import collected_log, header, manager, rewrite_manifest, train_state

DOCUMENTS = cast(Any, SimpleNamespace(documents=range(9), num_tokens=100_000))
PREPARED = PreparedData((PreparedSource("text", 1.0, DOCUMENTS, None, "f0", None, None),), (), None, 4096)


def config_of(
    steps: int = 20, *, interval: int = 5, kind: Any = "constant", lr: float = 3e-4, **schedule: Any
) -> Config:
    return Config(
        run=RunConfig(steps=steps),
        optimizer=OptimizerConfig(lr=lr),
        checkpoint=CheckpointConfig(interval=interval),
        schedule=ScheduleConfig(kind=kind, **{"warmup_steps": 0} | schedule),
    )


def trained(
    path: Path, *, logged: int, saved: tuple[int, ...] = (), config: Config | None = None, state: Any = None
) -> None:
    """A run directory as a run leaves it."""
    config = config or config_of()
    run_dir = RunDirectory(path, rank=0)
    run_dir.open()
    run_dir.record_attempt(config, layout={}, workload={}, wandb_id="abcd1234", command=[], step=0)
    run_dir.metrics_path.write_text("".join(f'{{"step": {step}}}\n' for step in range(1, logged + 1)))
    checkpoints = manager(run_dir.checkpoints_path, keep=9)
    sources = new_start(PREPARED, sequence_length=config.data.sequence_length, seed=config.run.seed).sources
    known = {"data_fingerprint": PREPARED.fingerprint, "sources": sources}
    for step in saved:
        checkpoints.save(
            step=step,
            fragments=[],
            train_state=replace(train_state(step), **known | (state or {})),
            rank_tensors={},
            header=replace(header(), parameters=(), config=config.model_dump(mode="json")),
        )
        run_dir.record_save(step)
    run_dir.close()


def restore(path: Path, config: Config | None = None, resume: Resume = NEWEST) -> Restored:
    run_dir = RunDirectory(path, rank=0)
    run_dir.open()
    try:
        checkpoints = manager(run_dir.checkpoints_path)
        return restore_state(config or config_of(), checkpoints, PREPARED, run_dir, SingleProcess(), resume)
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
def test_a_hostile_configuration_of_a_checkpoint_is_said_in_short_lines(tmp_path: Path, stored: Any) -> None:
    trained(tmp_path, logged=10, saved=(10,))
    (tmp_path / "config.yaml").unlink()
    rewrite_manifest(
        tmp_path / "checkpoints" / "step_00000010" / "MANIFEST.json",
        lambda fields: fields.update(config=stored, config_xxh3_128=config_hash(stored)),
    )
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        due_steps({}, restore(tmp_path, config_of(kind="wsd")))
    lines = str(caught.value).splitlines()
    assert 0 < len(lines) <= 31
    assert max(map(len, lines)) < 600


def test_an_accepted_change_is_part_of_the_state_and_a_later_resume_sees_none(tmp_path: Path) -> None:
    trained(tmp_path, logged=10, saved=(5, 10))
    lower = config_of(lr=1e-4)
    with pytest.raises(ConfigError, match=r"go on with the change by --resume\.accept optimizer\.lr"):
        restore(tmp_path, lower)
    restored = restore(tmp_path, lower, Resume(("optimizer.lr", "run.steps")))
    (change,) = restored.changes
    assert (change.key, change.old, change.new, change.step) == ("optimizer.lr", 3e-4, 1e-4, 10)
    assert restored.state.changes == restored.changes
    assert restored.state.rewarmup is None
    trained(tmp_path, logged=10, saved=(11,), config=lower, state={"changes": restored.changes})
    again = restore(tmp_path, lower)
    assert (again.state.step, again.changes, again.state.changes) == (11, (), restored.changes)


@pytest.mark.parametrize(("begin", "from_lr"), [("zero", 0.0), ("current", 3e-4)])
def test_a_return_to_the_schedule_begins_at_the_change_and_stays(tmp_path: Path, begin: str, from_lr: float) -> None:
    trained(tmp_path, logged=10, saved=(10,))
    lower = config_of(lr=1e-4, rewarmup_steps=4, rewarmup_from=begin)
    accept = Resume(("optimizer.lr",))
    rewarmup = restore(tmp_path, lower, accept).state.rewarmup
    assert rewarmup == Rewarmup(after_step=10, from_lr=from_lr, steps=4)
    trained(tmp_path, logged=12, saved=(12,), config=lower, state={"rewarmup": rewarmup})
    assert restore(tmp_path, config_of(lr=1e-4), accept).state.rewarmup == rewarmup
    # A second change in the midst of it begins where the first one had come to.
    second = restore(tmp_path, config_of(lr=5e-4, rewarmup_steps=8), accept).state.rewarmup
    assert second is not None
    assert (second.after_step, second.steps) == (12, 8)
    assert second.from_lr == pytest.approx((from_lr + 1e-4) / 2)
    with pytest.raises(ConfigError) as caught:
        restore(tmp_path, config_of(lr=5e-4, rewarmup_steps=9), accept)
    assert str(caught.value) == (
        "schedule.rewarmup_steps: 9 steps from step 12 on end behind run.steps 20; give 8 or fewer"
    )


def test_a_change_that_no_checkpoint_has_seen_can_be_taken_back(tmp_path: Path) -> None:
    trained(tmp_path, logged=10, saved=(10,))
    # An attempt with another rate was killed before its first save.
    trained(tmp_path, logged=12, config=config_of(lr=1e-4))
    assert restore(tmp_path).state.step == 10


def test_going_back_to_a_step_happens_once_for_a_configuration(tmp_path: Path) -> None:
    trained(tmp_path, logged=12, saved=(5, 10))
    with collected_log() as lines:
        restored = restore(tmp_path, resume=Resume(start=5))
    assert (restored.state.step, restored.start, lines) == (5, 5, [])
    inside = tmp_path / "checkpoints" / "step_00000005"
    assert restore(tmp_path, resume=Resume(start=inside)).start == 5
    run_dir = RunDirectory(tmp_path, rank=0)
    run_dir.open()
    record = start_record(5, config_of())
    run_dir.record_attempt(config_of(), layout={}, workload={}, wandb_id="a", command=[], step=5, start=record)
    run_dir.close()
    assert restore(tmp_path, resume=Resume(start=5)).state.step == 10
    other = config_of(lr=1e-4)
    assert restore(tmp_path, other, Resume(("optimizer.lr",), 5)).state.step == 5
    with pytest.raises(ConfigError) as caught:
        restore(tmp_path, resume=Resume(start=7))
    assert str(caught.value) == (
        f"--resume.from: {tmp_path}/checkpoints has no checkpoint of step 7; give a step that it has: 10, 5"
    )


def test_a_checkpoint_of_another_run_is_gone_on_from_with_step_and_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(tmp_path / "one", logged=10, saved=(5, 10))
    fork = Resume(start=tmp_path / "one" / "checkpoints" / "step_00000005")
    restored = restore(tmp_path / "two", resume=fork)
    assert (restored.state.step, restored.start, restored.found.path) == (5, fork.start, fork.start)
    assert restored.state.wandb_id != "w1"
    assert due_steps({}, restored) == []
    with pytest.raises(ConfigError, match=rf"optimizer\.lr: was 0\.0003, now 0\.0001: {fork.start} belongs to"):
        restore(tmp_path / "two", config_of(lr=1e-4), fork)
    with pytest.raises(ConfigError, match=r"^--resume\.from: .*nowhere: no such directory; name a run directory"):
        restore(tmp_path / "two", resume=Resume(start=tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"^run\.steps: 4 are fewer than the 5 steps of "):
        restore(tmp_path / "two", config_of(4), fork)
    wider = config_of().model_copy(update={"model": ModelConfig(hidden_size=64)})
    with monkeypatch.context() as patch:
        patch.setattr(discovery, "hash_file", lambda *arguments: pytest.fail("a file of weights was read"))
        with pytest.raises(ConfigError, match=r"^model\.hidden_size: was 2048, now 64: .*: the checkpoint's tensors"):
            restore(tmp_path / "two", wider, fork)
    trained(tmp_path / "two", logged=7, saved=(7,))
    assert restore(tmp_path / "two", resume=fork).state.step == 7


def test_the_best_of_the_run_itself_is_no_place_to_go_back_to(tmp_path: Path) -> None:
    trained(tmp_path / "one", logged=12, saved=(5, 10))
    for name in (tmp_path / "one" / "best", tmp_path / "one" / "checkpoints" / "best"):
        with pytest.raises(ConfigError) as caught:
            restore(tmp_path / "one", resume=Resume(start=name))
        assert str(caught.value) == (
            f"--resume.from: {name}: the best of run.dir may be another checkpoint at the next start; give its step, "
            "which `checkpoint list` marks"
        )
    with pytest.raises(ConfigError, match=r"^--resume\.from: .*best: no checkpoint is the best"):
        restore(tmp_path / "two", resume=Resume(start=tmp_path / "one" / "best"))


def test_a_count_of_validations_without_progress_goes_on_with_its_data(tmp_path: Path) -> None:
    lowest = Lowest(metric="eval/loss", value=2.5, step=3, num_since=2)
    trained(tmp_path / "one", logged=5, saved=(5,), state={"lowest": lowest, "validation": {"eval/loss": 3.0}})
    state = restore(tmp_path / "one").state
    assert (state.lowest, state.validation) == (lowest, {"eval/loss": 3.0})
    fork = Resume(start=tmp_path / "one" / "checkpoints" / "step_00000005")
    assert restore(tmp_path / "two", resume=fork).state.lowest is None
    longer = config_of()
    longer = longer.model_copy(update={"data": longer.data.model_copy(update={"sequence_length": 2048})})
    changed = restore(tmp_path / "one", longer, Resume(("data.sequence_length",)))
    assert changed.state.lowest is None


def test_weights_without_optimizer_state_are_no_place_to_go_on_from(tmp_path: Path) -> None:
    trained(tmp_path / "one", logged=5, saved=(5,))
    manifest = tmp_path / "one" / "checkpoints" / "step_00000005" / "MANIFEST.json"
    rewrite_manifest(manifest, lambda fields: fields.update(kinds=["master"]))
    with pytest.raises(ConfigError, match=r"has weights but no optimizer state; .* by --checkpoint\.init_from$"):
        restore(tmp_path / "two", resume=Resume(start=tmp_path / "one"))


def test_a_checkpoint_of_a_version_with_one_integer_goes_on(tmp_path: Path) -> None:
    trained(tmp_path, logged=5, saved=(5,), state={"sources": ()})
    state = restore(tmp_path).state
    assert state.consumed_samples == 40
    assert [(source.order, source.first_row) for source in state.sources] == [(0, 0)]


def test_positions_that_do_not_fit_the_sources_are_damage(tmp_path: Path) -> None:
    source = SourcePosition(content="x", order=0, first_row=0, sequence_length=16, seed=1)
    trained(tmp_path, logged=5, saved=(5,), state={"sources": (source, source)})
    with pytest.raises(CheckpointError, match=r"2 positions for 1 sources in the checkpoint$"):
        restore(tmp_path)
