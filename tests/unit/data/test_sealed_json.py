from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from qwen3next_train.data.sealed_json import read_sealed, write_sealed
from qwen3next_train.errors import StorageError

VALUE = {"a": [1, "é", None], "b": 2.5}


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for value in (VALUE, {}, [1]):
        write_sealed(path, value)
        assert read_sealed(path, max_bytes=1000) == value
    assert [each.name for each in tmp_path.iterdir()] == ["x.json"]


def test_no_flipped_bit_changes_the_value(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_sealed(path, VALUE)
    intact = path.read_bytes()
    for at in range(len(intact)):
        for bit in (1, 4, 32, 128):
            path.write_bytes(intact[:at] + bytes([intact[at] ^ bit]) + intact[at + 1 :])
            assert read_sealed(path, max_bytes=1000) in (None, VALUE)


@pytest.mark.parametrize(
    "content",
    ["", "null", "[]", "{}", '{"hash": 1, "content": 2}', '{"content": "1"}', "[" * 100_000, '{"content": {}}', "\0"],
)
def test_what_is_not_intact_is_nothing(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    assert read_sealed(path, max_bytes=1 << 20) is None


def test_what_is_no_small_file_is_nothing_and_is_replaced(tmp_path: Path) -> None:
    fifo, enormous, absent = tmp_path / "fifo", tmp_path / "enormous", tmp_path / "absent"
    os.mkfifo(fifo)
    enormous.touch()
    os.truncate(enormous, 1 << 40)
    for path in (fifo, enormous, absent):
        assert read_sealed(path, max_bytes=1000) is None
        os.mkfifo(path.with_name(path.name + ".tmp"))
        write_sealed(path, VALUE)
        assert read_sealed(path, max_bytes=1000) == VALUE


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE])
def test_what_cannot_be_read_now_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    write_sealed(tmp_path / "x.json", VALUE)

    def fail(*arguments: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(StorageError, match=r"x\.json: cannot be read .*may be intact"):
        read_sealed(tmp_path / "x.json", max_bytes=1000)
