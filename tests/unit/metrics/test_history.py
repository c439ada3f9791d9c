"""What an attempt finds in ``metrics.jsonl``: kept, cut, said to be lost, or kept aside."""

import errno
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen3next_train.errors import DataError
from qwen3next_train.metrics.history import cut_rows, keep_aside, last_step, read_rows, replace_file


def rows(*steps: int) -> bytes:
    return b"".join(json.dumps({"step": step}).encode() + b"\n" for step in steps)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "m.jsonl"


def beside(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.parent.iterdir())


@pytest.mark.parametrize(
    ("content", "resume_step", "due", "kept"),
    [
        (rows(1, 2, 3), 3, [range(1, 4)], [1, 2, 3]),
        (rows(1, 2, 3, 4, 5), 3, [range(1, 4)], [1, 2, 3]),
        # What a killed attempt was writing when it died.
        (rows(1, 2, 3) + b'{"step": 4, "lo', 3, [range(1, 4)], [1, 2, 3]),
        (rows(1, 2, 3) + bytes(512), 3, [range(1, 4)], [1, 2, 3]),
        (rows(10) + b'{"step": 20, "lo', 15, [range(10, 16, 10)], [10]),
        (rows(1, 2) + b"\0\0", 0, [], []),
        (b"", 0, [], []),
    ],
)
def test_what_a_dead_attempt_wrote_later_is_cut_without_a_word(path, capsys, content, resume_step, due, kept):
    path.write_bytes(content)
    cut_rows(path, resume_step, due)
    assert path.read_bytes() == rows(*kept)
    assert beside(path) == ["m.jsonl"]
    assert "lost" not in capsys.readouterr().err


@pytest.mark.parametrize("later", [b"", rows(4), b'{"step": 4, "lo'])
def test_the_rows_that_are_kept_are_handed_on_once(path, later):
    path.write_bytes(rows(1) + b"{}\n[1]\n" + rows(2, 2, 3) + later)
    taken = []
    cut_rows(path, 3, on_kept=taken.append)
    assert taken == [{"step": 1}, {"step": 2}, {"step": 3}]


@pytest.mark.parametrize(
    "damage",
    [
        b'{"step": 2, "lo\n',
        b'{"step": 2',
        bytes(4096) + b"\n",
        b"\xff\xfe\n",
        b"[" * 100_000 + b"\n",
        b'{"step": 1}\n',
        b'{"step": "2"}\n',
        b'{"step": 2.0}\n',
        b'{"step": true}\n',
        b'{"step": -2}\n',
        b'{"step": ' + b"9" * 5000 + b"}\n",
        b"x" * (9 << 20) + b"\n",
    ],
)
def test_a_damaged_row_is_kept_aside_and_its_step_said(path, capsys, damage):
    content = rows(1) + damage + (b"" if damage.endswith(b"\n") else b"\n") + rows(3, 4)
    path.write_bytes(content)
    cut_rows(path, 4, [range(1, 5)])
    assert path.read_bytes() == rows(1, 3, 4)
    assert (path.parent / "m.jsonl.damaged-1").read_bytes() == content
    damaged, lost = capsys.readouterr().err.splitlines()
    assert "damaged lines: " in damaged
    assert damaged.endswith(", left out; the old file is kept as m.jsonl.damaged-1")
    assert lost == f"{path}: rows lost: 1 (steps 2); the run goes on from step 4 without them"


def test_what_is_kept_aside_replaces_nothing(path):
    for number in (1, 2, 3):
        path.write_bytes(rows(1) + b"%d\n" % number + rows(2))
        cut_rows(path, 2)
    assert beside(path) == ["m.jsonl", *(f"m.jsonl.damaged-{number}" for number in (1, 2, 3))]
    assert (path.parent / "m.jsonl.damaged-2").read_bytes() == rows(1) + b"2\n" + rows(2)


@pytest.mark.parametrize(
    ("present", "resume_step", "due", "said"),
    [
        (None, 5, [range(1, 6)], "rows lost: 5 (steps 1 to 5); the run goes on from step 5"),
        ([], 5, [range(1, 6)], "rows lost: 5 (steps 1 to 5)"),
        ([1, 2], 5, [range(1, 6)], "rows lost: 3 (steps 3 to 5)"),
        ([1, 3, 5], 5, [range(1, 6)], "rows lost: 2 (steps 2, 4)"),
        ([10, 40], 40, [range(10, 41, 10)], "rows lost: 2 (steps 20 to 30)"),
        ([1, 2, 10], 20, [range(1, 5), range(10, 21, 10)], "rows lost: 3 (steps 3 to 4, 20)"),
        (list(range(1, 20, 2)), 20, [range(1, 21)], "rows lost: 10 (steps 2, 4, 6 and 7 more gaps)"),
        ([1, 2, 3, 4, 5], 5, [range(1, 6)], None),
        ([3, 10], 10, [range(10, 11, 10)], None),
        ([2], 5, [], None),
        (None, 0, [], None),
    ],
)
def test_lost_rows_are_said_by_their_steps(path, capsys, present, resume_step, due, said):
    if present is not None:
        path.write_bytes(rows(*present))
    cut_rows(path, resume_step, due)
    message = capsys.readouterr().err
    assert message == "" if said is None else said in message
    assert "damaged" not in message


def test_a_place_without_hard_links_gets_a_copy(path, monkeypatch):
    def refuse(*names: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("os.link", refuse)
    path.write_bytes(rows(1) + b"?\n" + rows(2))
    cut_rows(path, 2)
    assert path.read_bytes() == rows(1, 2)
    assert (path.parent / "m.jsonl.damaged-1").read_bytes() == rows(1) + b"?\n" + rows(2)


def test_what_a_killed_cut_left_is_removed(path):
    path.write_bytes(rows(1))
    path.with_name(".m.jsonl.tmp").write_bytes(b"half")
    cut_rows(path, 1)
    assert beside(path) == ["m.jsonl"]


def full_disk(written: bytes) -> Iterator[bytes]:
    yield written
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_old_file_and_no_half_of_the_new_one(path):
    path.write_bytes(rows(1))
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, full_disk(rows(1)), keep_old=False)
    assert path.read_bytes() == rows(1)
    assert beside(path) == ["m.jsonl"]


def test_a_full_disk_leaves_no_half_of_a_copy(path, monkeypatch):
    def copy_a_half(source: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    def refuse(*names: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    monkeypatch.setattr("shutil.copyfile", copy_a_half)
    path.write_bytes(rows(1, 2))
    with pytest.raises(OSError, match="No space left"):
        keep_aside(path, 1)
    assert beside(path) == ["m.jsonl"]


def test_last_step(path):
    assert last_step(path) == 0
    path.write_bytes(rows(1, 2) + b"?\n" + rows(7) + b'{"step": 8')
    assert last_step(path) == 7


def test_a_file_with_later_rows_is_kept_whole_and_replaces_nothing(path):
    assert keep_aside(path, 2) is None
    path.write_bytes(rows(1, 2, 3))
    assert keep_aside(path, 3) is None
    for number in (1, 2):
        assert keep_aside(path, 2) == path.with_name(f"m.jsonl.aside-{number}")
    cut_rows(path, 2)
    assert path.read_bytes() == rows(1, 2)
    assert path.with_name("m.jsonl.aside-1").read_bytes() == rows(1, 2, 3)


def test_rows_are_read_as_they_were_written(path):
    path.write_bytes(rows(1, 2) + b'{"step": 5, "loss/lm": null}\n{"step": 6')
    assert read_rows(path) == [{"step": 1}, {"step": 2}, {"step": 5, "loss/lm": None}]


@pytest.mark.parametrize("damage", [b"{}\n", b"\xff\n", b'{"step": 2, "loss/lm": true}\n', rows(1), b"[" * 5_000_000])
def test_a_damaged_row_is_an_error_for_who_only_reads(path, damage):
    path.write_bytes(rows(1) + damage)
    with pytest.raises(DataError, match="line 2 is "):
        read_rows(path)
    assert path.read_bytes() == rows(1) + damage
