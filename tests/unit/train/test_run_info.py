import json
import math
from pathlib import Path

import pytest

from qwen3next_train.checkpoint.filesystem import LOCAL_FILESYSTEM
from qwen3next_train.train.run_info import ValidatedRows, due_ranges, is_run_info, read_info

WHOLE = {"wandb_id": "abcd1234", "attempts": [{"first_step": 0}], "checkpoint_step": 7, "versions": {}, "more": [1]}


def read(path: Path, info: object) -> dict:
    path.write_text(json.dumps(info))
    return read_info(LOCAL_FILESYSTEM, path)


def test_what_is_well_typed_is_given(tmp_path, capsys):
    assert read_info(LOCAL_FILESYSTEM, tmp_path / "run.json") == {}
    assert read(tmp_path / "run.json", WHOLE) == WHOLE
    assert read(tmp_path / "run.json", WHOLE | {"checkpoint_step": None})["checkpoint_step"] is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("wandb_id", 5),
        ("wandb_id", None),
        ("wandb_id", ["a"]),
        ("wandb_id", ""),
        ("wandb_id", "../../elsewhere"),
        ("wandb_id", "a\nb"),
        ("wandb_id", "a" * 1000),
        ("attempts", 3),
        ("attempts", {}),
        ("attempts", [1, "two"]),
        ("attempts", [{}, None]),
        ("checkpoint_step", "7"),
        ("checkpoint_step", True),
        ("checkpoint_step", -1),
        ("checkpoint_step", 7.0),
        ("checkpoint_step", math.nan),
        ("checkpoint_step", 10**30),
    ],
)
def test_what_is_ill_typed_is_left_out_and_said(tmp_path, capsys, key, value):
    path = tmp_path / "run.json"
    assert read(path, WHOLE | {key: value}) == {name: WHOLE[name] for name in WHOLE if name != key}
    assert capsys.readouterr().err == f"{path}: {key} not as this program writes it; it is written anew\n"


def test_what_another_program_wrote_is_no_run_info(tmp_path):
    path = tmp_path / "run.json"
    assert not is_run_info(LOCAL_FILESYSTEM, path)
    for info, expected in ((WHOLE, True), ({"attempts": []}, False), ([], False), ({"versions": {}}, False)):
        path.write_text(json.dumps(info))
        assert is_run_info(LOCAL_FILESYSTEM, path) == expected
    path.write_text("{")
    assert not is_run_info(LOCAL_FILESYSTEM, path)


def attempt(first: object, interval: object) -> dict:
    return {"first_step": first, "logging_interval": interval}


@pytest.mark.parametrize(
    ("attempts", "last", "due"),
    [
        ([attempt(0, 1)], 5, [1, 2, 3, 4, 5]),
        ([attempt(0, 5)], 12, [5, 10]),
        ([attempt(0, 5)], 4, []),
        ([attempt(0, 1), attempt(3, 5)], 12, [1, 2, 3, 5, 10]),
        # A later attempt that fell back does the steps again.
        ([attempt(0, 1), attempt(6, 2), attempt(3, 4)], 9, [1, 2, 3, 4, 8]),
        ([attempt(0, 1), attempt(0, 1), attempt(4, 1)], 4, [1, 2, 3, 4]),
        ([attempt(5, 5)], 10, [10]),
        # Attempts of an earlier version do not say at which steps they logged.
        ([{}, attempt(4, 2)], 8, [6, 8]),
        ([attempt(0, 1), {}], 8, []),
        ([attempt("0", "1"), attempt(True, 0), attempt(None, -3), attempt(0, 10**30)], 9, []),
        ([], 9, []),
    ],
)
def test_steps_that_must_have_been_logged(attempts, last, due):
    assert [step for steps in due_ranges(attempts, last) for step in steps] == due


def validated(first: object, **rows: object) -> dict:
    return {
        "first_step": first,
        "validation_rows": {prefix.replace("_", "/"): digest for prefix, digest in rows.items()},
    }


@pytest.mark.parametrize(
    ("attempts", "steps"),
    [
        ([validated(0, eval_="a")], [1, 2, 3, 4, 5, 6]),
        ([validated(0, eval_="a"), validated(3, eval_="a")], [1, 2, 3, 4, 5, 6]),
        ([validated(0, eval_="a"), validated(3, eval_="b")], [4, 5, 6]),
        # Back to the first rows: what was measured on them counts again.
        ([validated(0, eval_="a"), validated(2, eval_="b"), validated(4, eval_="a")], [1, 2, 5, 6]),
        # A later attempt that went back has replaced the rows behind its first step.
        ([validated(0, eval_="a"), validated(4, eval_="b"), validated(2, eval_="a")], [1, 2, 3, 4, 5, 6]),
        # Of versions that recorded none; and where nobody did, all that is known is that they are of one metric.
        ([{"first_step": 0}, validated(3, eval_="a")], [4, 5, 6]),
        ([{"first_step": 0}, {"first_step": 3, "validation_rows": 7}, {}], [1, 2, 3, 4, 5, 6]),
        # Other sets say nothing of this one; a set that is gone is compared with itself.
        ([validated(0, eval_="a", eval_code_="x"), validated(3, eval_code_="y")], [1, 2, 3]),
        ([], [1, 2, 3, 4, 5, 6]),
    ],
)
def test_which_validations_compare(attempts, steps):
    rows = ValidatedRows(attempts)
    assert [step for step in range(1, 7) if rows.compares("eval/loss", step)] == steps
    assert all(rows.compares("loss/lm", step) for step in range(1, 7))
