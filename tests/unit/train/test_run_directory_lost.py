"""A directory that is deleted, renamed or unmounted under its run."""

import errno
import shutil
from pathlib import Path

import pytest

from qwen3next_train.errors import ExitCode, StorageError
from qwen3next_train.train.run_directory import RunDirectory
from tests.unit.train.run_directories import names, opened, record


def test_an_untouched_directory_is_the_same(tmp_path):
    run_dir = opened(tmp_path)
    run_dir.require_same()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    run_dir.require_same()
    assert names(tmp_path) == [".lock", "checkpoints", "notes.txt"]
    run_dir.close()


LOST = {
    "deleted": (shutil.rmtree, "No such file or directory"),
    "renamed": (lambda path: path.rename(path.with_name("elsewhere")), "No such file or directory"),
    "replaced": (lambda path: (path.rename(path.with_name("elsewhere")), path.mkdir()), "another directory is in its"),
    "replaced by a file": (lambda path: (shutil.rmtree(path), path.write_text("")), "another directory is in its"),
    "parent deleted": (lambda path: shutil.rmtree(path.parent), "No such file or directory"),
    "parent replaced by a file": (
        lambda path: (shutil.rmtree(path.parent), path.parent.write_text("")),
        "Not a directory",
    ),
    "checkpoints behind a link that leads nowhere": (
        lambda path: (path / "checkpoints").symlink_to("nowhere/at/all"),
        "checkpoints: No such file or directory",
    ),
}


@pytest.mark.parametrize(
    ("gone", "is_lost"),
    [
        ((), False),
        ((".lock",), False),
        (("run.json",), False),
        (("config.yaml",), False),
        (("metrics.jsonl", "checkpoints"), False),
        ((".lock", "run.json"), True),
        (("config.yaml", "run.json"), True),
        ((".lock", "config.yaml", "run.json", "metrics.jsonl", "checkpoints"), True),
    ],
)
def test_a_directory_whose_files_are_being_deleted_counts_as_deleted(tmp_path, gone, is_lost):
    run_dir = opened(tmp_path)
    record(run_dir)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.jsonl").write_text("")
    run_dir.require_same()
    for name in gone:
        path = tmp_path / name
        path.rmdir() if path.is_dir() else path.unlink()
    if is_lost:
        with pytest.raises(StorageError, match=r"under the run \(it has been emptied: .* are gone\)"):
            run_dir.require_same()
    else:
        run_dir.require_same()
    run_dir.close()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("lose", "reason"), LOST.values(), ids=LOST)
def test_a_directory_that_is_gone_is_missed_and_not_made_again(tmp_path, rank, lose, reason):
    path = tmp_path / "runs" / "run"
    holder = opened(path)
    run_dir = RunDirectory(path, rank=rank)
    if rank:
        run_dir.open()
    else:
        run_dir = holder
    lose(path)
    left = sorted(str(each) for each in tmp_path.rglob("*"))
    with pytest.raises(StorageError, match=f"run was deleted, renamed or unmounted under the run .*{reason}") as caught:
        run_dir.require_same()
    assert caught.value.exit_code == 74
    if "checkpoints" not in reason:
        assert run_dir.finish(ExitCode.STORAGE, "gone"), "recorded nowhere, so it is printed"
        assert sorted(str(each) for each in tmp_path.rglob("*")) == left
    holder.close()


def test_checkpoints_on_another_filesystem_than_before(tmp_path):
    path = tmp_path / "run"
    opened(path).close()
    (path / "checkpoints").mkdir()
    run_dir = opened(path)
    run_dir.require_same()
    (path / "checkpoints").rmdir()
    shared_memory = Path("/dev/shm")
    if shared_memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs two filesystems")
    (path / "checkpoints").symlink_to(shared_memory)
    with pytest.raises(StorageError, match="checkpoints is on another filesystem than before"):
        run_dir.require_same()
    run_dir.close()


def test_what_cannot_be_looked_up_at_the_moment_is_not_gone(tmp_path, monkeypatch):
    run_dir = opened(tmp_path)

    def fail(path, **options):
        raise OSError(errno.ETIMEDOUT, "Connection timed out", str(path))

    monkeypatch.setattr(Path, "stat", fail)
    run_dir.require_same()
    monkeypatch.undo()
    run_dir.close()
