from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from qwen3next_train.checkpoint.filesystem import (
    LOCAL_FILESYSTEM,
    Entry,
    describe_os_error,
    format_bytes,
    hash_file,
    make_dirs,
    remove_tree,
    wait_for_directory,
)
from tests.unit.checkpoint.support import FailingFilesystem


def test_entry_describes_the_name_not_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    assert LOCAL_FILESYSTEM.entry(tmp_path / "file") == Entry("file", 5)
    kinds = [LOCAL_FILESYSTEM.entry(tmp_path / name) for name in ("link", "pipe")]
    assert [entry.kind for entry in kinds if entry] == ["symbolic link", "special file"]
    directory = LOCAL_FILESYSTEM.entry(tmp_path)
    assert directory is not None
    assert directory.kind == "directory"
    assert LOCAL_FILESYSTEM.entry(tmp_path / "absent") is None


def test_removing_a_tree_removes_links_but_not_their_targets(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("x")
    tree = tmp_path / "tree"
    (tree / "inner").mkdir(parents=True)
    (tree / "inner" / "file").write_text("x")
    (tree / "link").symlink_to(tmp_path / "precious")
    remove_tree(LOCAL_FILESYSTEM, tree)
    remove_tree(LOCAL_FILESYSTEM, tree)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
    assert (tmp_path / "precious" / "file").exists()
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    remove_tree(LOCAL_FILESYSTEM, tmp_path / "link")
    assert (tmp_path / "precious" / "file").exists()


def test_make_dirs_creates_parents_and_accepts_what_exists(tmp_path: Path) -> None:
    make_dirs(LOCAL_FILESYSTEM, tmp_path / "a" / "b")
    make_dirs(LOCAL_FILESYSTEM, tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    assert (tmp_path / "a").stat().st_mode & 0o007 == 0


def test_a_directory_that_appears_late_is_waited_for(tmp_path: Path) -> None:
    timer = threading.Timer(0.1, (tmp_path / "late").mkdir)
    timer.start()
    wait_for_directory(LOCAL_FILESYSTEM, tmp_path / "late", timeout_s=10)
    timer.join()
    with pytest.raises(FileNotFoundError, match="a filesystem that all ranks share"):
        wait_for_directory(LOCAL_FILESYSTEM, tmp_path / "never", timeout_s=0.1)


def test_errors_and_sizes_read_well() -> None:
    assert describe_os_error(OSError(errno.EIO, "Input/output error", "/a/b")) == "b: Input/output error"
    assert describe_os_error(OSError(errno.EIO, "Input/output error")) == "Input/output error"
    assert describe_os_error(OSError()) == "OSError"
    assert [format_bytes(size) for size in (0, 1023, 1024, 3 << 29, 5 << 40)] == [
        "0 B",
        "1023 B",
        "1.00 KiB",
        "1.50 GiB",
        "5.00 TiB",
    ]


def test_reading_errors_name_the_file(tmp_path: Path) -> None:
    filesystem = FailingFilesystem(0, errno.EIO, once=False, only=("read",))
    (tmp_path / "x").write_text("x")
    with pytest.raises(OSError, match="Input/output error") as caught:
        hash_file(filesystem, tmp_path / "x")
    assert caught.value.filename == str(tmp_path / "x")
    filesystem.close_all()
