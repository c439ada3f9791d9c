"""The best checkpoint: kept beside the newest, told by manifests alone, found by name."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qwen3next_train.checkpoint.best import best_of, ranked
from qwen3next_train.checkpoint.filesystem import LOCAL_FILESYSTEM
from qwen3next_train.checkpoint.inspection import checkpoint_command
from qwen3next_train.checkpoint.manager import CheckpointManager
from qwen3next_train.checkpoint.names import list_checkpoints
from qwen3next_train.checkpoint.weights import find_checkpoint
from qwen3next_train.errors import CheckpointError, ConfigError
from qwen3next_train.parallel.control import ControlGroup, SingleProcess
from tests.unit.checkpoint.support import (
    CutFilesystem,
    HookedFilesystem,
    Killed,
    ThreadControl,
    fragments_of,
    header,
    names,
    on_ranks,
    train_state,
)

METRIC = "eval/code/loss"


def manager(
    directory: Path,
    *,
    control: ControlGroup | None = None,
    keep: int = 1,
    best: str = METRIC,
    filesystem: HookedFilesystem | None = None,
) -> CheckpointManager:
    return CheckpointManager(
        directory,
        control=control or SingleProcess(),
        keep=keep,
        best=best,
        filesystem=filesystem or HookedFilesystem(),
        visibility_timeout_s=0.2,
    )


def save(
    checkpoints: CheckpointManager,
    step: int,
    value: float | None,
    *,
    best: str = METRIC,
    rank: int = 0,
    world_size: int = 1,
    consecutive_skips: int = 0,
    rows: str = "rows",
) -> None:
    """A checkpoint whose step had a validation that found ``value`` on ``rows``."""
    found = {} if value is None else {METRIC: value, "eval/loss": -value}
    head = header(world_size)
    checkpoints.save(
        step=step,
        fragments=fragments_of(step, rank, world_size),
        train_state=replace(
            train_state(step, consecutive_skips=consecutive_skips),
            validation=found,
            validation_rows={"eval/code/": rows},
        ),
        rank_tensors={"rng": torch.tensor([step, rank])},
        header=replace(head, config=head.config | {"checkpoint": {"best": best}}),
    )


def save_all(directory: Path, values: Sequence[float | None], *, keep: int = 1) -> None:
    """Steps 1, 2, ... by one process."""
    checkpoints = manager(directory, keep=keep)
    for step, value in enumerate(values, start=1):
        save(checkpoints, step, value)


def steps(directory: Path) -> list[int]:
    return sorted(int(name.removeprefix("step_")) for name in names(directory) if name.startswith("step_"))


@pytest.mark.parametrize(
    ("values", "keep", "kept", "best"),
    [
        ([3.0, 1.0, 2.0, 4.0], 1, [2, 4], 2),
        ([3.0, 1.0, 2.0, 4.0], 2, [2, 3, 4], 2),
        ([3.0, 2.0, 1.0], 2, [2, 3], 3),
        ([1.0, 1.0, 1.0], 1, [1, 3], 1),
        ([2.0, None, None], 1, [1, 3], 1),
        ([None, None], 1, [2], None),
    ],
)
def test_the_lowest_is_kept_beside_the_newest(
    tmp_path: Path, values: list[float | None], keep: int, kept: list[int], best: int | None
) -> None:
    directory = tmp_path / "checkpoints"
    save_all(directory, values, keep=keep)
    assert steps(directory) == kept
    if best is None:
        assert "best" not in names(directory)
    else:
        assert (directory / "best").read_text() == f"step_{best:08d}\n"
        assert find_checkpoint(tmp_path / "best", SingleProcess()).step == best


def test_a_state_that_skips_steps_is_never_the_best(tmp_path: Path) -> None:
    checkpoints = manager(tmp_path)
    save(checkpoints, 1, 2.0)
    save(checkpoints, 2, 1.0, consecutive_skips=3)
    save(checkpoints, 3, 4.0)
    assert (tmp_path / "best").read_text() == "step_00000001\n"
    assert steps(tmp_path) == [1, 3]


def test_ranks_agree_and_a_later_process_goes_on(tmp_path: Path) -> None:
    def act(control: ThreadControl) -> int:
        checkpoints = manager(tmp_path, control=control)
        for step, value in ((1, 5.0), (2, 1.5), (3, 3.0)):
            save(checkpoints, step, value, rank=control.rank, world_size=2)
        return checkpoints.name_best().step

    assert list(on_ranks(2, act)) == [2, 2]
    save(manager(tmp_path), 4, 1.75)
    assert steps(tmp_path) == [2, 4]
    save(manager(tmp_path), 5, 1.25)
    assert steps(tmp_path) == [5]


def test_a_step_that_is_saved_again_counts_by_its_new_value(tmp_path: Path) -> None:
    checkpoints = manager(tmp_path)
    for step, value in ((1, 1.0), (2, 2.0), (1, 9.0)):
        save(checkpoints, step, value)
    save(checkpoints, 3, 3.0)
    assert (tmp_path / "best").read_text() == "step_00000002\n"
    assert steps(tmp_path) == [2, 3]


def test_values_of_other_rows_do_not_compare(tmp_path: Path) -> None:
    """A resume has changed the set: what was easier before is not the best of what follows."""
    save_all(tmp_path, [1.0, 2.0])
    assert steps(tmp_path) == [1, 2]
    later = manager(tmp_path)
    # A stop before the first validation of the other rows.
    save(later, 3, None, rows="rows")
    assert (steps(tmp_path), find_checkpoint(tmp_path / "best", SingleProcess()).step) == ([1, 3], 1)
    save(later, 4, 8.0, rows="other")
    assert (steps(tmp_path), (tmp_path / "best").read_text()) == ([4], "step_00000004\n")
    for step, value in ((5, 9.0), (6, 7.0), (7, 7.5)):
        save(later, step, value, rows="other")
    assert (steps(tmp_path), find_checkpoint(tmp_path / "best", SingleProcess()).step) == ([6, 7], 6)


def test_another_metric_is_another_best(tmp_path: Path) -> None:
    save_all(tmp_path, [3.0, 1.0, 2.0], keep=3)
    known = list_checkpoints(names(tmp_path))
    assert [rated.value for rated in ranked(LOCAL_FILESYSTEM, tmp_path, known, "eval/loss")] == [-3.0, -2.0, -1.0]
    assert ranked(LOCAL_FILESYSTEM, tmp_path, known, "eval/bpb") == []
    save(manager(tmp_path, best="eval/loss"), 4, 0.5, best="eval/loss")
    assert steps(tmp_path) == [1, 4]
    # Of a run that names none any more the file goes, and with it the name.
    save(manager(tmp_path, best="eval/bpb"), 5, 0.5, best="eval/bpb")
    assert "best" not in names(tmp_path)
    assert best_of(LOCAL_FILESYSTEM, tmp_path, list_checkpoints(names(tmp_path))) is None


@pytest.mark.parametrize("content", [None, b"", b"step_00000001\n", b"step_99999999\n", b"\xff\x00" * 999])
def test_a_damaged_pointer_misleads_nobody_and_is_made_again(tmp_path: Path, content: bytes | None) -> None:
    directory = tmp_path / "checkpoints"
    save_all(directory, [3.0, 1.0, 2.0], keep=3)
    (directory / "best").unlink()
    if content is not None:
        (directory / "best").write_bytes(content)
    for name in (tmp_path / "best", directory / "best"):
        assert find_checkpoint(name, SingleProcess()).step == 2
    save(manager(directory), 4, 4.0)
    assert (directory / "best").read_text() == "step_00000002\n"
    assert steps(directory) == [2, 4]


def test_a_damaged_best_is_refused_by_name_and_not_kept_for_it(tmp_path: Path) -> None:
    save_all(tmp_path, [3.0, 1.0, 2.0], keep=3)
    file = tmp_path / "step_00000002" / "rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x77")
    with pytest.raises(CheckpointError, match=r"step_00000002: rank_00000.safetensors does not match its hash"):
        find_checkpoint(tmp_path / "best", SingleProcess())
    save(manager(tmp_path), 4, 4.0)
    assert (tmp_path / "best").read_text() == "step_00000003\n"
    assert steps(tmp_path) == [3, 4]


def test_a_run_without_a_best_says_so(tmp_path: Path) -> None:
    save(manager(tmp_path / "checkpoints", best=""), 1, 1.0, best="")
    with pytest.raises(ConfigError, match=r"no checkpoint is the best: the run had no checkpoint\.best, or no valid"):
        find_checkpoint(tmp_path / "best", SingleProcess())
    with pytest.raises(ConfigError, match=r"^checkpoint list: .*best: no checkpoint is the best"):
        checkpoint_command("list", tmp_path / "best")
    # A folder of that name is a folder.
    (tmp_path / "checkpoints").rename(tmp_path / "best")
    assert find_checkpoint(tmp_path / "best", SingleProcess()).step == 1


def test_list_and_verify_mark_it_and_take_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_all(tmp_path / "checkpoints", [3.0, 1.25, 2.0], keep=3)
    assert checkpoint_command("list", tmp_path) == 0
    ends = [line.split("  ")[-1].strip() for line in capsys.readouterr().out.splitlines()]
    assert ends == ["state", "complete", "complete, best (eval/code/loss 1.2500)", "complete"]
    assert checkpoint_command("verify", tmp_path / "best") == 0
    _, row = capsys.readouterr().out.splitlines()
    assert row.split()[0] == "2"
    assert row.endswith("verified, best (eval/code/loss 1.2500)")


def test_death_at_any_file_operation_leaves_the_best(tmp_path: Path) -> None:
    """Of a save after which the best is the oldest of three, two of which have to go."""
    template = tmp_path / "template" / "checkpoints"
    template.parent.mkdir()
    save_all(template, [1.0, 2.0], keep=3)
    num_cuts = 0
    for cut in range(10_000):
        directory = tmp_path / f"cut_{cut}" / "checkpoints"
        shutil.copytree(template.parent, directory.parent)
        filesystem = CutFilesystem(cut)
        try:
            save(manager(directory, filesystem=filesystem), 3, 3.0)
        except Killed:
            num_cuts += 1
        else:
            break
        finally:
            filesystem.close_all()
        assert find_checkpoint(directory / "best", SingleProcess()).step == 1
        assert (directory / "best").read_text() == "step_00000001\n"
        save(manager(directory), 4, 4.0)
        assert steps(directory) == [1, 4]
    assert num_cuts > 30
