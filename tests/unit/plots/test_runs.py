"""What is read of a run, and what is said of one that cannot be plotted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qwen3next_train.errors import ConfigError, DataError, StorageError
from qwen3next_train.plots.runs import read_runs
from tests.unit.plots.runs import row, write_run


def test_rows_become_columns(tmp_path: Path) -> None:
    rows = [row(1, loss_lm=8.0), row(2, loss_lm=None, eval_loss=7.5), row(4, loss_lm=6.0)]
    (run,) = read_runs([write_run(tmp_path / "mine", rows)])
    assert run.name == "mine"
    assert run.along("steps").tolist() == [1, 2, 4]
    assert run.along("tokens").tolist() == [100, 200, 400]
    np.testing.assert_array_equal(run.values["loss/lm"], [8.0, np.nan, 6.0])
    np.testing.assert_array_equal(run.values["eval/loss"], [np.nan, 7.5, np.nan])


def test_the_file_may_be_named_itself(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "mine", [row(1, loss_lm=8.0)], first_steps=(0, 1))
    (run,) = read_runs([folder / "metrics.jsonl"])
    assert (run.name, run.folder, run.resumed_at) == ("mine", folder, (1,))


def test_runs_of_the_same_name_are_told_by_their_paths(tmp_path: Path) -> None:
    folders = []
    for parent in ("a", "b"):
        (tmp_path / parent).mkdir()
        folders.append(write_run(tmp_path / parent / "mine", [row(1, loss_lm=8.0)]))
    assert [run.name for run in read_runs(folders)] == [str(folder) for folder in folders]


@pytest.mark.parametrize(
    ("first_steps", "resumed_at"),
    [
        ((0,), ()),
        ((0, 2, 4), (2, 4)),
        # The third attempt went back behind the second, whose rows it has replaced.
        ((0, 4, 2), (2,)),
        ((0, 2, 2), (2,)),
        # Without a checkpoint the second attempt began anew.
        ((0, 0), ()),
    ],
)
def test_resumes_are_those_whose_rows_are_there(
    tmp_path: Path, first_steps: tuple[int, ...], resumed_at: tuple[int, ...]
) -> None:
    rows = [row(step, loss_lm=8.0) for step in range(1, 7)]
    (run,) = read_runs([write_run(tmp_path / "mine", rows, first_steps=first_steps)])
    assert run.resumed_at == resumed_at
    assert run.resumes_along("tokens") == [100 * step for step in resumed_at]


def test_a_row_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "mine", [row(1, loss_lm=8.0)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    (run,) = read_runs([folder])
    assert run.steps.tolist() == [1]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ('{"step": 2, "lo\n', 'line 2 is damaged (got {"step": 2, "lo\\n)'),
        ('{"step": 2, "loss/lm": "8"}\n', 'line 2 is damaged (got {"step": 2, "loss/lm": "8"}\\n)'),
        ("\n", "line 2 is damaged (got \\n)"),
        ('{"step": 1}\n', "line 2 is of step 1, after one of step 1"),
    ],
)
def test_a_damaged_row_is_named(tmp_path: Path, line: str, text: str) -> None:
    folder = write_run(tmp_path / "mine", [row(1, loss_lm=8.0)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(line)
    with pytest.raises(DataError) as raised:
        read_runs([folder])
    assert str(raised.value).startswith(f"{folder}/metrics.jsonl: {text}; ")
    assert len(str(raised.value).splitlines()) == 1


def test_a_run_that_is_not_there_or_has_logged_nothing(tmp_path: Path) -> None:
    empty = write_run(tmp_path / "empty", [])
    (tmp_path / "bare").mkdir()
    for path, text in (
        (tmp_path / "absent", "does not exist"),
        (tmp_path / "bare", "has no metrics.jsonl"),
        (empty, "has no row yet"),
    ):
        with pytest.raises(ConfigError, match=text):
            read_runs([path])


def test_what_is_no_file_cannot_be_read(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "mine", [row(1, loss_lm=8.0)])
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl").mkdir()
    with pytest.raises(StorageError, match=r"metrics\.jsonl: cannot be read"):
        read_runs([folder])
