"""TensorBoard's event files, read back as TensorBoard reads them: record by record, checksums included."""

from __future__ import annotations

import importlib.util
import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from qwen3next_train.errors import ConfigError, StorageError
from qwen3next_train.metrics import tensorboard_sink
from qwen3next_train.metrics.samples import Sample
from qwen3next_train.metrics.tensorboard_sink import TensorBoardSink, require_library


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts begin a second after each other."""
    seconds = iter(range(1_700_000_000, 1_800_000_000))
    monkeypatch.setattr(tensorboard_sink.time, "time", lambda: float(next(seconds)))


def write(folder: Path, steps: range, *, resume_step: int = 0, factor: float = 1.0) -> None:
    sink = TensorBoardSink(folder, resume_step=resume_step)
    for step in steps:
        sink.log({"step": step, "tokens": 100 * step, "loss/lm": factor * step})
    sink.close()


def events(path: Path) -> Iterator[Any]:
    data = path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        assert struct.unpack("<I", data[8:12]) == (masked_crc32c(data[:8]),)
        body = data[12 : 12 + length]
        assert struct.unpack("<I", data[12 + length : 16 + length]) == (masked_crc32c(body),)
        yield event_pb2.Event.FromString(body)
        data = data[16 + length :]


def rows(folder: Path) -> list[tuple[int, dict[str, float]]]:
    return [
        (event.step, {value.tag: value.simple_value for value in event.summary.value})
        for path in sorted(folder.iterdir())
        for event in events(path)
        if event.HasField("summary")
    ]


def row(step: int, factor: float = 1.0) -> tuple[int, dict[str, float]]:
    return step, {"tokens": 100.0 * step, "loss/lm": factor * step}


def test_rows_are_events(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path / "tensorboard", resume_step=0)
    sink.log({"step": 3, "tokens": 2**40, "loss/lm": math.nan, "optim/lr": 0.25})
    sink.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    version, start, logged = events(path)
    assert version.file_version == "brain.Event:2"
    assert (start.session_log.status, start.step) == (event_pb2.SessionLog.START, 1)
    values = {value.tag: value.simple_value for value in logged.summary.value}
    assert logged.step == 3
    assert (values["tokens"], values["optim/lr"]) == (2.0**40, 0.25)
    assert math.isnan(values["loss/lm"])


def test_samples_are_text(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path, resume_step=0)
    sink.log({"step": 3, "loss/lm": 1.0})
    sink.log_samples(3, [Sample("a # ", "b\nc", 2, "length"), Sample("d", "", 0, "stop")])
    sink.close()
    (path,) = tmp_path.iterdir()
    *_, event = events(path)
    assert event.step == 3
    assert [(value.tag, value.metadata.plugin_data.plugin_name) for value in event.summary.value] == [
        ("samples/1/text_summary", "text"),
        ("samples/2/text_summary", "text"),
    ]
    assert [value.tensor.string_val for value in event.summary.value] == [[b"    a # b\n    c\n"], [b"    d\n"]]


@pytest.mark.parametrize("resume_step", [2, 4, 6])
def test_a_resume_writes_no_step_twice(tmp_path: Path, resume_step: int) -> None:
    write(tmp_path, range(1, 7))
    write(tmp_path, range(resume_step + 1, 9), resume_step=resume_step, factor=2.0)
    assert rows(tmp_path) == [row(step, 1.0 if step <= resume_step else 2.0) for step in range(1, 9)]
    # A TensorBoard that has read the old file forgets what it has seen of these steps.
    *_, newest = sorted(tmp_path.iterdir())
    assert [event.step for event in events(newest) if event.HasField("session_log")] == [resume_step + 1]


def test_a_third_attempt_may_go_back_behind_the_second(tmp_path: Path) -> None:
    write(tmp_path, range(1, 5))
    write(tmp_path, range(5, 9), resume_step=4, factor=2.0)
    write(tmp_path, range(3, 5), resume_step=2, factor=3.0)
    assert rows(tmp_path) == [row(1), row(2), row(3, 3.0), row(4, 3.0)]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_new_run_starts_empty(tmp_path: Path) -> None:
    write(tmp_path, range(1, 5))
    write(tmp_path, range(1, 2), factor=2.0)
    assert rows(tmp_path) == [row(1, 2.0)]


@pytest.mark.parametrize("tail", [b"\x01", struct.pack("<QI", 2**60, 0) + b"x", struct.pack("<QI", 4, 0) + b"\xff" * 8])
def test_what_a_killed_attempt_left_of_an_event_is_cut_off(tmp_path: Path, tail: bytes) -> None:
    write(tmp_path, range(1, 4))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes() + tail)
    write(tmp_path, range(4, 5), resume_step=3)
    assert rows(tmp_path) == [row(1), row(2), row(3), row(4)]


def test_a_full_disk_costs_rows_and_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sink = TensorBoardSink(tmp_path, resume_step=0)
    write_all = os.write
    with monkeypatch.context() as context:
        context.setattr(os, "write", lambda descriptor, data: write_all(descriptor, data[:5]))
        for step in (1, 2):
            sink.log({"step": step, "tokens": 100 * step, "loss/lm": step})
    sink.log({"step": 3, "tokens": 300, "loss/lm": 3})
    sink.close()
    assert rows(tmp_path) == [row(3)]
    assert capsys.readouterr().err.count("cannot be written (No space left on device)") == 1


def test_what_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").touch()
    with pytest.raises(StorageError, match=r"tensorboard: cannot be written \(File exists\)"):
        TensorBoardSink(tmp_path / "tensorboard", resume_step=0)


def test_without_the_library_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    require_library(False)
    with pytest.raises(ConfigError, match=r"pip install 'qwen3next-train\[tensorboardx\]'"):
        require_library(True)
