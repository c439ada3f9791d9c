import json
import logging
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qwen3next_train.errors import StorageError
from qwen3next_train.log import get_logger
from qwen3next_train.metrics.sinks import JsonlSink, encode_row


@pytest.fixture
def messages():
    """What the package logger says."""
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    get_logger().addHandler(handler)
    yield seen
    get_logger().removeHandler(handler)


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def write_steps(path: Path, first: int, last: int, *, resume_step: int) -> None:
    sink = JsonlSink(path, resume_step=resume_step)
    for step in range(first, last + 1):
        sink.log({"step": step, "loss/lm": 1 / step})
    sink.close()


def test_numbers_come_back_bit_for_bit(tmp_path):
    values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, math.pi, 2.5e22, 1e16 + 2]
    sink = JsonlSink(tmp_path / "m.jsonl", resume_step=0)
    for step, value in enumerate(values, start=1):
        sink.log({"step": step, "loss/lm": value, "tokens": 2**53 + 1})
    sink.close()
    rows = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [row["loss/lm"].hex() for row in rows] == [value.hex() for value in values]
    assert {row["tokens"] for row in rows} == {2**53 + 1}
    assert isinstance(rows[0]["step"], int)


def test_what_json_has_no_number_for_is_null():
    row = encode_row({"step": 3, "a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0})
    assert row == b'{"step": 3, "a": null, "b": null, "c": null, "d": 1.0}\n'


def test_a_row_can_be_read_as_soon_as_it_is_logged(tmp_path):
    sink = JsonlSink(tmp_path / "m.jsonl", resume_step=0)
    sink.log({"step": 1})
    assert (tmp_path / "m.jsonl").read_bytes() == b'{"step": 1}\n'
    sink.close()


def test_resume_cuts_later_rows_and_goes_on(tmp_path):
    path = tmp_path / "m.jsonl"
    write_steps(path, 1, 10, resume_step=0)
    write_steps(path, 7, 12, resume_step=6)
    assert steps_in(path) == list(range(1, 13))
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.jsonl"]


def test_resume_at_the_last_row_leaves_the_file_alone(tmp_path):
    path = tmp_path / "m.jsonl"
    write_steps(path, 1, 5, resume_step=0)
    inode = path.stat().st_ino
    write_steps(path, 6, 6, resume_step=5)
    assert path.stat().st_ino == inode
    assert steps_in(path) == [1, 2, 3, 4, 5, 6]


def test_no_checkpoint_means_an_empty_start(tmp_path):
    path = tmp_path / "m.jsonl"
    write_steps(path, 1, 5, resume_step=0)
    write_steps(path, 1, 2, resume_step=0)
    assert steps_in(path) == [1, 2]


@pytest.mark.parametrize(
    "tail", [b'{"step": 4, "lo', b'{"step": 4}', b"\0" * 512, b'{"step": 4, "loss/lm": 0.1234\n', b"\xff\xfe\n"]
)
def test_a_torn_tail_is_cut(tmp_path, tail):
    path = tmp_path / "m.jsonl"
    write_steps(path, 1, 3, resume_step=0)
    with path.open("ab") as file:
        file.write(tail)
    write_steps(path, 4, 5, resume_step=3)
    assert steps_in(path) == [1, 2, 3, 4, 5]


def test_a_torn_row_of_a_kept_step_is_cut_too(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2')
    JsonlSink(path, resume_step=2).close()
    assert steps_in(path) == [1]


@pytest.mark.parametrize(
    "junk",
    [
        b"\n",
        b"[]\n",
        b"null\n",
        b'"step"\n',
        b'{"step": "2"}\n',
        b'{"step": true}\n',
        b"{}\n",
        b'{"step": 2.0}\n',
        b"[" * 100_000 + b"\n",
        b'{"step": 1}\n',
    ],
)
def test_lines_that_are_no_rows_or_repeat_one_are_dropped(tmp_path, junk):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n' + junk + b'{"step": 2}\n')
    JsonlSink(path, resume_step=2).close()
    assert steps_in(path) == [1, 2]


def test_a_link_is_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("precious")
    (tmp_path / "m.jsonl").symlink_to(outside)
    with pytest.raises(StorageError, match=r"m\.jsonl: cannot be opened"):
        JsonlSink(tmp_path / "m.jsonl", resume_step=0)
    assert outside.read_text() == "precious"


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), os.mkfifo, lambda path: None])
def test_unusable_file_is_one_line(tmp_path, make):
    path = tmp_path / "m.jsonl"
    make(path)
    if not path.exists():
        path = tmp_path / "missing" / "m.jsonl"
    with pytest.raises(StorageError) as caught:
        JsonlSink(path, resume_step=0)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


FULL_DISK = """
import resource, sys
from pathlib import Path
from qwen3next_train.errors import StorageError
from qwen3next_train.metrics.sinks import JsonlSink

path = Path(sys.argv[1])
sink = JsonlSink(path, resume_step=0)
sink.log({"step": 1, "loss/lm": 0.5})
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 7, hard))
for step in range(2, 6):
    sink.log({"step": step, "loss/lm": 0.5})
    try:
        sink.sync()
    except StorageError as error:
        print(error, flush=True)
print(path.read_bytes().count(b"step"), flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
sink.log({"step": 6, "loss/lm": 0.5})
sink.sync()
sink.close()
"""


def test_full_disk_holds_rows_back_and_catches_up(tmp_path):
    path = tmp_path / "m.jsonl"
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=True)
    *failures, num_rows = done.stdout.splitlines()
    assert failures == [
        f"{path}: cannot be written; {rows} in memory only; free space"
        for rows in ("1 row is", "2 rows are", "3 rows are", "4 rows are")
    ], "no checkpoint may count on them"
    assert num_rows == "2", "the limit lets a piece of the second row through"
    assert steps_in(path) == [1, 2, 3, 4, 5, 6]
    warnings = done.stderr.splitlines()
    assert len(warnings) == 2
    assert "cannot be written (No space left on device); training goes on" in warnings[0]
    assert "writing again, 5 rows caught up" in warnings[1]


def test_rows_lost_at_the_end_are_counted(tmp_path, messages):
    sink = JsonlSink(tmp_path / "m.jsonl", resume_step=0)
    os.close(sink._descriptor)
    sink._descriptor = os.open("/dev/full", os.O_WRONLY)
    sink.log({"step": 1})
    sink.log({"step": 2})
    sink.close()
    assert len(messages) == 2
    assert "No space left on device" in messages[0]
    assert "2 rows could not be written" in messages[1]


@pytest.mark.parametrize("what", ["deleted", "replaced"])
def test_a_file_lost_under_the_run_is_made_again_before_a_checkpoint_counts_on_it(tmp_path, messages, what):
    path = tmp_path / "m.jsonl"
    sink = JsonlSink(path, resume_step=0)
    sink.log({"step": 1})
    path.unlink()
    if what == "replaced":
        path.write_text("somebody's\n")
    sink.log({"step": 2})
    sink.sync()
    sink.log({"step": 3})
    assert steps_in(path) == [1, 2, 3]
    kept = "deleted" if what == "deleted" else "replaced (kept as m.jsonl.damaged-1)"
    assert messages == [f"{path}: {kept} under the run; made again with the rows so far"]
    assert what == "deleted" or (tmp_path / "m.jsonl.damaged-1").read_text() == "somebody's\n"
    sink.close()


def test_a_file_that_cannot_be_made_again_fails_the_save(tmp_path):
    (tmp_path / "run").mkdir()
    sink = JsonlSink(tmp_path / "run" / "m.jsonl", resume_step=0)
    sink.log({"step": 1})
    (tmp_path / "run" / "m.jsonl").unlink()
    (tmp_path / "run").rmdir()
    with pytest.raises(StorageError, match=r"m\.jsonl: cannot be written \(No such file or directory\)"):
        sink.sync()
    sink.close()
    assert list(tmp_path.iterdir()) == []


KILLED = """
import sys
from pathlib import Path
from qwen3next_train.metrics.sinks import JsonlSink

resume_step = int(sys.argv[2])
sink = JsonlSink(Path(sys.argv[1]), resume_step=resume_step)
print("open", flush=True)
step = resume_step
while True:
    step += 1
    sink.log({"step": step, "loss/lm": 1 / step, "pad": 0.1 * step})
"""


def test_killed_at_any_moment_the_file_is_whole_up_to_the_checkpoint(tmp_path):
    path = tmp_path / "m.jsonl"
    checkpoint = 0
    for round_ in range(4):
        child = subprocess.Popen([sys.executable, "-c", KILLED, str(path), str(checkpoint)], stdout=subprocess.PIPE)
        assert child.stdout is not None
        assert child.stdout.readline() == b"open\n"
        while path.stat().st_size < 3000 * (round_ + 1):
            pass
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        last = len(path.read_bytes().splitlines())
        checkpoint = max(checkpoint, last - 7)
    JsonlSink(path, resume_step=checkpoint).close()
    assert steps_in(path) == list(range(1, checkpoint + 1))


CUT_AND_DIE = """
import os, sys
from pathlib import Path
from qwen3next_train.metrics import sinks

calls = 0
def dying(call):
    def wrapper(*args, **kwargs):
        global calls
        calls += 1
        if calls == int(sys.argv[2]):
            os.kill(os.getpid(), 9)
        return call(*args, **kwargs)
    return wrapper

os.open, os.fsync, Path.rename, Path.unlink = dying(os.open), dying(os.fsync), dying(Path.rename), dying(Path.unlink)
sinks.JsonlSink(Path(sys.argv[1]), resume_step=5).close()
print(calls)
"""


@pytest.mark.slow
def test_killed_before_every_operation_of_the_cut(tmp_path):
    def rows() -> list[int]:
        return steps_in(tmp_path / "m.jsonl")

    crash_point, done = 0, None
    while done is None or done.returncode == -signal.SIGKILL:
        crash_point += 1
        write_steps(tmp_path / "m.jsonl", 1, 9, resume_step=0)
        done = subprocess.run(
            [sys.executable, "-c", CUT_AND_DIE, str(tmp_path / "m.jsonl"), str(crash_point)], capture_output=True
        )
        assert rows() in ([1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5])
        JsonlSink(tmp_path / "m.jsonl", resume_step=5).close()
        assert rows() == [1, 2, 3, 4, 5]
        assert [entry.name for entry in tmp_path.iterdir()] == ["m.jsonl"]
    assert done.returncode == 0
    assert crash_point == int(done.stdout) + 1 > 5
