"""A checkpoint that cannot be read now may be intact: it is said, nothing is passed over and nothing touched."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any

import pytest

from qwen3next_train.checkpoint import inspection, weights
from qwen3next_train.checkpoint.filesystem import LocalFilesystem, is_unreadable
from qwen3next_train.checkpoint.fragments import FragmentReader
from qwen3next_train.checkpoint.inspection import checkpoint_command
from qwen3next_train.checkpoint.manager import VerifiedCheckpoint
from qwen3next_train.checkpoint.weights import find_checkpoint
from qwen3next_train.errors import CheckpointError, ExitCode, StorageError
from qwen3next_train.parallel.control import SingleProcess
from tests.unit.checkpoint.support import (
    HookedFilesystem,
    ThreadControl,
    assert_holds,
    collected_log,
    failing,
    manager,
    names,
    on_ranks,
    save,
)

CODES = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ETIMEDOUT)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    directory = tmp_path / "checkpoints"
    for step in (1, 2):
        save(manager(directory), step)
    return directory


def snapshot(directory: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(directory)): (path.stat().st_ino, path.read_bytes() if path.is_file() else b"")
        for path in sorted(directory.rglob("*"))
    }


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize(
    ("operation", "file"),
    [
        ("open", "MANIFEST.json"),
        ("read", "MANIFEST.json"),
        ("entry", "MANIFEST.json"),
        ("entry", "step_00000002"),
        ("open", "rank_00000.safetensors"),
        ("read", "rank_00000.safetensors"),
        ("entry", "rank_00000.safetensors"),
    ],
)
def test_no_older_checkpoint_takes_its_place(checkpoints: Path, operation: str, file: str, code: int) -> None:
    before = snapshot(checkpoints)
    with collected_log() as lines, pytest.raises(StorageError) as caught:
        manager(checkpoints, filesystem=failing(operation, file, code)).find_latest()
    assert lines == []
    assert snapshot(checkpoints) == before
    assert re.fullmatch(
        rf"{checkpoints}/step_00000002: rank 0 cannot read it \({file}: {os.strerror(code)}"
        r"(: raise the limit, ulimit -n, which is [0-9]+)?\); it may be intact, so "
        r"nothing is changed: make it readable and run the same line again",
        str(caught.value),
    )
    assert_holds(manager(checkpoints).find_latest(), 2)


def test_what_one_rank_cannot_read_ends_all(tmp_path: Path) -> None:
    def write(control: ThreadControl) -> None:
        for step in (1, 2):
            save(manager(tmp_path / "checkpoints", control=control), step, rank=control.rank, world_size=2)

    assert on_ranks(2, write) == [None, None]

    def look(control: ThreadControl) -> VerifiedCheckpoint | None:
        bad = failing("open", "rank_00001.safetensors", errno.EIO) if control.rank else HookedFilesystem()
        return manager(tmp_path / "checkpoints", control=control, filesystem=bad).find_latest()

    errors = on_ranks(2, look)
    assert [type(error) for error in errors] == [StorageError, StorageError]
    assert "rank 1 cannot read it (rank_00001.safetensors: Input/output error)" in str(errors[0])


def test_a_node_that_does_not_see_what_the_others_see_ends_all(tmp_path: Path) -> None:
    def write(control: ThreadControl) -> None:
        save(manager(tmp_path / "checkpoints", control=control), 1, rank=control.rank, world_size=2)

    assert on_ranks(2, write) == [None, None]
    (tmp_path / "unmounted").mkdir()

    def look(control: ThreadControl) -> VerifiedCheckpoint | None:
        folder = tmp_path / ("unmounted" if control.rank else "checkpoints")
        return manager(folder, control=control).find_latest()

    errors = on_ranks(2, look)
    assert [type(error) for error in errors] == [StorageError, StorageError]
    assert "rank 1 cannot read it (step_00000001: not visible on this node; run.dir must be on" in str(errors[0])


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR])
def test_what_is_not_there_is_damage(checkpoints: Path, code: int) -> None:
    assert not is_unreadable(OSError(code, os.strerror(code)))
    assert_holds(manager(checkpoints, filesystem=failing("open", "rank_00000.safetensors", code)).find_latest(), 1)


def test_retention_deletes_nothing_while_a_checkpoint_cannot_be_read(checkpoints: Path) -> None:
    bad = failing("open", "rank_00000.safetensors", errno.EACCES)
    with collected_log() as lines:
        save(manager(checkpoints, keep=2, filesystem=bad), 3)
    assert "step_00000002: rank 0 cannot read it" in lines[0]
    assert names(checkpoints) == {"step_00000001", "step_00000002", "step_00000003"}
    save(manager(checkpoints, keep=2), 4)
    assert names(checkpoints) == {"step_00000003", "step_00000004"}


def test_reading_the_tensors_tells_the_two_apart(checkpoints: Path) -> None:
    found = manager(checkpoints).find_latest()
    assert found is not None
    bad = failing("open", "rank_00000.safetensors", errno.EMFILE)
    with pytest.raises(StorageError, match=r"rank_00000\.safetensors: cannot be read \(Too many open files: raise"):
        FragmentReader(found.path, found.manifest, filesystem=bad).read("norm.weight", "master", 0, 5)
    (found.path / "rank_00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing, not a regular file"):
        FragmentReader(found.path, found.manifest).read("norm.weight", "master", 0, 5)


def test_the_inspecting_command_ends_with_its_own_code(
    checkpoints: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = failing("open", "MANIFEST.json", errno.EACCES, step=1)
    monkeypatch.setattr(inspection, "LOCAL_FILESYSTEM", bad)
    assert checkpoint_command("list", checkpoints.parent) == ExitCode.STORAGE
    assert "unreadable: MANIFEST.json: Permission denied" in capsys.readouterr().out.splitlines()[2]


@pytest.mark.parametrize("operation", ["is_dir", "exists"])
def test_a_place_that_cannot_be_looked_up(checkpoints: Path, monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(weights.Path, operation, refuse)
    with pytest.raises(StorageError, match=r"cannot be read \([\w.]+: Permission denied\); make it readable"):
        find_checkpoint(checkpoints.parent, SingleProcess())


def test_the_system_s_own_refusal(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user without rights sees it; root reads everything, so the call is told to refuse."""
    real_open = os.open

    def refuse(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if str(path).endswith("step_00000002/MANIFEST.json"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real_open(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StorageError, match="Permission denied"):
        manager(checkpoints, filesystem=LocalFilesystem()).find_latest()
