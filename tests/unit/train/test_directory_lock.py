"""Whose a directory is."""

import json
import os
from pathlib import Path

import pytest

from qwen3next_train.checkpoint.names import MANIFEST_START
from qwen3next_train.errors import ConfigError
from qwen3next_train.train.directory_lock import DirectoryLock, read_holder, require_own
from qwen3next_train.train.run_directory import RunDirectory, record_end


def snapshot(path: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(each.relative_to(path)): (each.lstat().st_mtime_ns, each.read_bytes() if each.is_file() else b"")
        for each in path.rglob("*")
    }


FOREIGN = {
    "a configuration": ["config.yaml"],
    "metrics": ["metrics.jsonl"],
    "a hidden file": [".staged-x"],
    "one of a name of ours": [".staged-0-17-run.json"],
    "an end of something": ["exit.json"],
    "a log": ["log.txt"],
    "files in a folder": ["checkpoints/epoch_1.pt"],
    "a checkpoint of something else": ["checkpoints/step_00000010/MANIFEST.json"],
    "another program's run.json": ["run.json"],
    "another program's lock": [".lock"],
    "an empty lock beside files": ["metrics.jsonl", ".lock.is-empty"],
    "sources": ["pyproject.toml", "src/main.py", "README.md", "LICENSE"],
    "a name with a line break": ["a\nb"],
}


@pytest.mark.parametrize("files", FOREIGN.values(), ids=FOREIGN)
def test_a_directory_with_foreign_files_is_rejected_before_it_is_touched(tmp_path, files):
    for name in files:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"a": 1}')
        if name.endswith(".is-empty"):
            path.unlink()
            path.with_suffix("").write_text("")
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError) as caught:
        RunDirectory(tmp_path, rank=0).open()
    assert caught.value.exit_code == 2
    first = sorted({name.split("/")[0] for name in files if not name.endswith(".is-empty")})[0]
    assert f"has files that no run has written ({first}".replace("\n", "\\n") in str(caught.value)
    assert "\n" not in str(caught.value)
    record_end(tmp_path, ConfigError("too many processes"))
    assert snapshot(tmp_path) == before


def test_only_a_few_names_are_listed(tmp_path):
    for number in range(9):
        (tmp_path / f"{number}.txt").write_text("")
    with pytest.raises(ConfigError, match=r"\(0\.txt, 1\.txt, 2\.txt and 6 more\); choose a new or an empty directory"):
        require_own(tmp_path)


@pytest.mark.parametrize("names", [[], ["checkpoints/"], ["wandb/", "checkpoints/"], ["lost+found/x"], [".lock"]])
def test_a_directory_without_anybodys_work_is_taken(tmp_path, names):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).write_text("")
    require_own(tmp_path)


def test_a_link_to_an_empty_folder_on_a_larger_disk_is_nobodys(tmp_path):
    (tmp_path / "large").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "large")
    require_own(tmp_path / "run")


def with_lock(path: Path) -> None:
    DirectoryLock(path, "name").close()


def with_run_info(path: Path) -> None:
    (path / "run.json").write_text(json.dumps({"versions": {}, "attempts": []}))


def with_checkpoint(path: Path) -> None:
    folder = path / "checkpoints" / "step_00000003"
    folder.mkdir(parents=True)
    (folder / "MANIFEST.json").write_bytes(MANIFEST_START + b", and damaged")


@pytest.mark.parametrize("mark", [with_lock, with_run_info, with_checkpoint])
def test_a_run_is_known_by_any_of_its_marks_whatever_else_is_there(tmp_path, mark):
    mark(tmp_path)
    for name in ("notes.txt", "config.yaml", ".staged-x"):
        (tmp_path / name).write_text("mine")
    run_dir = RunDirectory(tmp_path, rank=0)
    run_dir.open()
    run_dir.close()
    assert (tmp_path / ".staged-x").read_text() == "mine"


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.write_bytes(b"\0" * 512),
        lambda path: path.write_text("[" * 60_000),
        lambda path: path.write_text('{"attempt": 1, "host": [], "since": {}}'),
        lambda path: path.write_text('{"attempt": "a", "host": "h"}'),
        lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 10**10),
        lambda path: path.write_text(""),
    ],
)
def test_a_damaged_lock_file_is_made_anew_in_a_run(tmp_path, make):
    with_checkpoint(tmp_path)
    make(tmp_path / ".lock")
    assert read_holder(tmp_path) == {}
    lock = DirectoryLock(tmp_path, "name")
    assert read_holder(tmp_path)["attempt"] == "name"
    assert (tmp_path / ".lock").stat().st_size == 512
    lock.rename_attempt("other")
    assert read_holder(tmp_path)["attempt"] == "other"
    lock.close()


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir])
def test_a_lock_file_that_is_no_file(tmp_path, make):
    make(tmp_path / ".lock")
    with pytest.raises((OSError, ConfigError)):
        DirectoryLock(tmp_path, "name")
