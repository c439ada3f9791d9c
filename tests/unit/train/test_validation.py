"""What validations say, the lowest value so far, and the end of a run that finds no lower one."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from qwen3next_train.batch import PackedBatch
from qwen3next_train.checkpoint.train_state import TrainState
from qwen3next_train.config.schema import CheckpointConfig, Config, EvalConfig
from qwen3next_train.data.prepare import prepare_stores
from qwen3next_train.data.validation import open_validation
from qwen3next_train.engine.base import StepResult
from qwen3next_train.errors import ConfigError
from qwen3next_train.row_slices import WHOLE_ROW
from qwen3next_train.topology import Topology
from qwen3next_train.train.loop import Run, train
from qwen3next_train.train.validation import (
    ValidationSet,
    end_for_want_of_progress,
    validate,
    validation_sets,
    with_validation,
    without_other_rows,
)
from tests.unit.checkpoint.support import fragments_of, names, train_state
from tests.unit.data.corpus import counting_store, make_config
from tests.unit.train.loop_runs import run_of

SET = ValidationSet("eval/", [], None, "rows")
PATIENT = Config(eval=EvalConfig(interval=1, patience=2))


class ScriptedEngine:
    """Validation losses from a list, one a validation set."""

    def __init__(self, losses: Sequence[float]) -> None:
        self._losses: Iterator[float] = iter(losses)

    def train_step(self, *arguments: object, **options: object) -> StepResult:
        return StepResult({"loss/lm": 1.0}, skipped=False)

    def eval_loss(self, batches: Sequence[PackedBatch]) -> tuple[float, int]:
        return next(self._losses), 8

    def fragments(self) -> Any:
        return iter(fragments_of(1))


def states(losses: Sequence[float], config: Config = PATIENT, state: TrainState | None = None) -> list[TrainState]:
    """After each of the validations, one a step."""
    found = []
    state = state or train_state(0)
    for loss in losses:
        state = with_validation(replace(state, step=state.step + 1), {"eval/loss": loss}, [SET], config)
        found.append(state)
    return found


def test_each_set_has_its_loss_and_bits() -> None:
    sets = [ValidationSet(f"eval/{name}", [], size, "") for name, size in (("", 4.0), ("code/", None), ("b/", 2.0))]
    assert validate(cast(Any, ScriptedEngine([1.0, 2.0, 3.0])), sets) == {
        "eval/loss": 1.0,
        "eval/bpb": 1 / math.log(2) / 4,
        "eval/code/loss": 2.0,
        "eval/b/loss": 3.0,
        "eval/b/bpb": 3 / math.log(2) / 2,
    }


def test_validations_without_a_new_lowest_are_counted() -> None:
    found = states([3.0, 2.0, 2.0, math.nan, 1.0])
    assert [(each.lowest.value, each.lowest.step, each.lowest.num_since) for each in found if each.lowest] == [
        (3.0, 1, 0),
        (2.0, 2, 0),
        (2.0, 2, 1),
        (2.0, 2, 2),
        (1.0, 5, 0),
    ]
    assert [each.validation for each in found][2:4] == [{"eval/loss": 2.0}, {}]
    ends = [end_for_want_of_progress(each, PATIENT) for each in found]
    assert ends == [
        *(None, None, None),
        "ended at step 4: 2 validations in a row without a new lowest eval/loss (eval.patience 2), which was 2.0000 at "
        "step 2",
        None,
    ]


def test_a_loss_that_was_never_finite_is_no_progress() -> None:
    *_, last = states([math.inf, math.nan])
    assert end_for_want_of_progress(last, PATIENT) == (
        "ended at step 2: 2 validations in a row without a new lowest eval/loss (eval.patience 2), which was no finite "
        "value"
    )
    assert states([1.0], state=last)[-1].lowest == states([1.0], state=replace(train_state(2)))[-1].lowest


def test_the_count_is_part_of_the_state_and_of_its_metric() -> None:
    state = states([3.0, 4.0])[-1]
    # As a manifest holds it.
    stored = TrainState(**json.loads(json.dumps(asdict(state))))
    assert stored == state
    assert end_for_want_of_progress(states([3.5], state=stored)[-1], PATIENT) is not None
    other = PATIENT.model_copy(update={"eval": EvalConfig(interval=1, patience=1, patience_metric="eval/a/loss")})
    assert end_for_want_of_progress(state, other) is None
    assert end_for_want_of_progress(state, Config()) is None
    assert states([9.0], Config(), state)[-1].lowest is None


def test_a_count_is_of_the_rows_it_was_made_on(capsys: pytest.CaptureFixture[str]) -> None:
    state = states([3.0, 4.0, 5.0])[-1]
    assert state.validation_rows == {"eval/": "rows"}
    code = ValidationSet("eval/code/", [], None, "code")
    assert without_other_rows(state, [SET, code]) == state
    assert capsys.readouterr().err == ""
    other = replace(SET, rows="other")
    assert without_other_rows(state, [other, code]) == replace(state, lowest=None)
    assert capsys.readouterr().err == (
        "eval/loss: of other rows than before; checkpoint.best and eval.patience go by validations from now on\n"
    )
    assert without_other_rows(state, [code]).lowest is None


def run_with_losses(path: Path, losses: Sequence[float], *, start: TrainState | None = None, patience: int = 2) -> Run:
    """A run of six steps, each with a validation and a checkpoint."""
    run = run_of(path, "......", keep=1)
    run.config = run.config.model_copy(
        update={
            "eval": EvalConfig(interval=1, patience=patience),
            "checkpoint": CheckpointConfig(interval=2, keep=1),
        }
    )
    run.engine = cast(Any, ScriptedEngine(losses))
    run.validation = [SET]
    if start is not None:
        run.state, run.saved_step = start, start.step
    return run


def test_a_run_ends_early_with_a_checkpoint(tmp_path: Path) -> None:
    run = run_with_losses(tmp_path, [3.0, 2.0, 2.5, 2.0])
    rows: list[Any] = []
    run.sinks = [cast(Any, SimpleNamespace(log=rows.append))]
    ends: list[tuple[int, bool]] = []
    run.samples = cast(Any, SimpleNamespace(take=lambda step, is_last: ends.append((step, is_last))))
    assert train(run) is None
    assert run.state.step == 4
    assert ends == [(1, False), (2, False), (3, False), (4, True)]
    assert [row["eval/loss"] for row in rows] == [3.0, 2.0, 2.5, 2.0]
    found = run.checkpoints.find_latest()
    assert found is not None
    assert found.manifest.train_state == run.state
    assert found.manifest.train_state.validation == {"eval/loss": 2.0}
    # The same line again trains no step, with more patience it goes on.
    again = run_with_losses(tmp_path, [], start=found.manifest.train_state)
    assert train(again) is None
    assert again.state.step == 4
    patient = run_with_losses(tmp_path, [2.5, 1.0], start=found.manifest.train_state, patience=4)
    assert train(patient) is None
    assert patient.state.step == 6


def test_a_run_that_ends_between_saves_is_saved(tmp_path: Path) -> None:
    run = run_with_losses(tmp_path, [1.0, 2.0, 3.0])
    assert train(run) is None
    assert run.state.step == 3
    assert "step_00000003" in names(tmp_path / "checkpoints")


def test_a_resume_goes_on_counting_where_its_checkpoint_is(tmp_path: Path) -> None:
    """Killed after step 3, whose validation is done again: one without progress before it, one after."""
    first = run_with_losses(tmp_path, [1.0, 2.0, 3.0])
    first.progress = lambda step: None if step < 3 else (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        train(first)
    found = first.checkpoints.find_latest()
    assert found is not None
    assert found.step == 2
    second = run_with_losses(tmp_path, [4.0], start=found.manifest.train_state)
    assert train(second) is None
    assert second.state.step == 3
    assert end_for_want_of_progress(second.state, second.config) == (
        "ended at step 3: 2 validations in a row without a new lowest eval/loss (eval.patience 2), which was 1.0000 at "
        "step 1"
    )


def test_a_step_without_a_validation_has_none(tmp_path: Path) -> None:
    run = run_with_losses(tmp_path, [1.0, 2.0], patience=0)
    run.config = run.config.model_copy(update={"eval": EvalConfig(interval=4)})
    seen: dict[int, dict[str, float]] = {}
    run.progress = lambda step: seen.update({step: run.state.validation})
    train(run)
    assert seen == {1: {}, 2: {}, 3: {}, 4: {"eval/loss": 1.0}, 5: {}, 6: {"eval/loss": 2.0}}


def test_bits_that_nobody_knows_are_refused_at_the_start(tmp_path: Path) -> None:
    counting_store(tmp_path / "b", [100])
    sets = {"ids": [{"source": str(tmp_path / "b")}]}
    config = make_config(tmp_path / "cache", [{"source": str(tmp_path / "b")}], validation_sets=sets)
    config = config.model_copy(
        update={
            "data": config.data.model_copy(update={"validation_fraction": 0.0}),
            "eval": EvalConfig(interval=1, rows=4, patience_metric="eval/ids/bpb"),
        }
    )
    data = open_validation(prepare_stores(config), config)
    (found,) = validation_sets(data, config, Topology(), WHOLE_ROW)
    assert (found.prefix, found.bytes_per_token) == ("eval/ids/", None)
    line = (
        f"eval/ids/bpb: nobody knows how many bytes the text of {tmp_path / 'b'} has (token ids, or a part of a token "
        "store); choose eval/ids/loss"
    )
    for key, changed in (
        ("checkpoint.best", {"checkpoint": CheckpointConfig(best="eval/ids/bpb")}),
        ("eval.patience_metric", {"eval": config.eval.model_copy(update={"patience": 1})}),
    ):
        with pytest.raises(ConfigError) as caught:
            validation_sets(data, config.model_copy(update=changed), Topology(), WHOLE_ROW)
        assert str(caught.value) == f"{key} {line}"
