"""Rows and lines of samples."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from qwen3next_train.log import get_logger
from qwen3next_train.metrics.history import MAX_ROW_BYTES
from qwen3next_train.metrics.samples import Sample, samples_row, say_samples
from qwen3next_train.metrics.sinks import JsonlSink, encode_row

SAMPLES = [Sample("a\nb", "c\x1b[0m", 3, "length"), Sample("d", "", 0, "stop")]


def test_a_row_has_all_of_a_sample() -> None:
    assert samples_row(8, SAMPLES) == {
        "step": 8,
        "samples": [
            {"prompt": "a\nb", "text": "c\x1b[0m", "tokens": 3, "finish_reason": "length"},
            {"prompt": "d", "text": "", "tokens": 0, "finish_reason": "stop"},
        ],
    }


@pytest.mark.parametrize("count", [1, 64])
def test_no_row_is_longer_than_a_resume_reads(tmp_path: Path, count: int) -> None:
    longest = Sample("\U0001f40d" * MAX_ROW_BYTES, "\U0001f40d" * MAX_ROW_BYTES, 10**9, "not_finite")
    row = samples_row(10**8, [longest] * count)
    assert 0.9 * MAX_ROW_BYTES < len(encode_row(row)) < MAX_ROW_BYTES
    sink = JsonlSink(tmp_path / "samples.jsonl", resume_step=0)
    sink.log(row)
    sink.close()
    JsonlSink(tmp_path / "samples.jsonl", resume_step=10**8).close()
    assert json.loads((tmp_path / "samples.jsonl").read_text()) == row


def test_a_resume_keeps_what_is_before_it(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    sink = JsonlSink(path, resume_step=0)
    for step in (2, 4, 6):
        sink.log(samples_row(step, SAMPLES))
    sink.close()
    JsonlSink(path, resume_step=5).close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 4]


def test_the_log_has_a_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: lines.append(record.getMessage()))
    get_logger().addHandler(handler)
    say_samples(8, [*SAMPLES, Sample("p" * 999, "t" * 999, 5, "length")])
    get_logger().removeHandler(handler)
    assert lines[:2] == [
        r"sample 1 of step 8: 'a\nb' -> 'c\x1b[0m'",
        "sample 2 of step 8: 'd' -> '' (stop)",
    ]
    assert lines[2] == f"sample 3 of step 8: {'p' * 200!r} -> {'t' * 200!r}"
