import io
import logging
import os
import re
import sys

import pytest

from qwen3next_train.errors import StorageError
from qwen3next_train.log import get_logger
from qwen3next_train.metrics.console import ConsoleSink, format_duration, format_si, format_step, open_run_log
from qwen3next_train.metrics.redaction import MASK, Redactor

RECORD = {
    "step": 120,
    "tokens": 503_316_480,
    "loss/lm": 6.81234,
    "loss/mtp": 7.031,
    "loss/load_balancing": 1.00312,
    "optim/lr": 7.2e-5,
    "optim/grad_norm": 0.8412,
    "optim/skipped_steps": 0,
    "perf/flops_per_step": 105.4e15,
    "perf/tflops_per_gpu": 248.2,
    "perf/mfu": 0.251,
    "perf/tokens_per_s": 2.5e6,
    "perf/step_time_s": 1.68,
    "perf/data_wait_s": 0.00504,
    "mem/peak_gib": 61.24,
    "moe/max_violation": 0.42,
    "moe/dead_experts": 3,
}


class Terminal(io.StringIO):
    """A stderr that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_whole_line():
    assert format_step(RECORD, total_steps=238_419, eta="eta 4d14h") == (
        "step    120/238419  loss 6.8123 (mtp 7.0310, aux 1.0031)  lr 7.20e-05  gnorm 0.841  105.4 PFLOP  "
        "248.2 TFLOP/s/gpu  mfu 25.1%  2.5 Mtok/s  data 0.3%  mem 61.2 GiB  moe max +42% dead 3  eta 4d14h"
    )


def test_what_is_missing_is_left_out():
    assert format_step({"step": 5, "loss/lm": 2.0}, total_steps=9, eta="") == "step 5/9  loss 2.0000"
    assert format_step({"step": 5}, total_steps=10, eta="") == "step  5/10"


def test_rare_values_are_shown_when_there_are_any():
    record = {"step": 9, "loss/lm": float("nan"), "optim/skipped_steps": 2, "eval/loss": 1.5, "eval/bpb": 0.75}
    assert format_step(record, total_steps=9, eta="") == (
        "step 9/9  loss nan  skipped 2  eval 1.5000 (0.7500 bits/byte)"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 "),
        (12.3456, "12.35 "),
        (1234, "1.234 k"),
        (2.5e6, "2.5 M"),
        (3.1e9, "3.1 G"),
        (5e12, "5 T"),
        (2.51e22, "2.51e+04 E"),
    ],
)
def test_si(value, text):
    assert format_si(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (12.4, "12s"), (59.6, "1m00s"), (200, "3m20s"), (7500, "2h05m"), (396_000, "4d14h"), (86_400, "1d00h")],
)
def test_duration(seconds, text):
    assert format_duration(seconds) == text


def test_plain_lines_and_no_bar_without_a_terminal(monkeypatch):
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    sink = ConsoleSink(total_steps=10, first_step=0, eta_s=lambda steps: steps * 2.0)
    for step in (1, 2):
        sink.log({"step": step, "loss/lm": 3.0})
        sink.advance(step)
    sink.close()
    assert stderr.getvalue() == "step  1/10  loss 3.0000  eta 18s\nstep  2/10  loss 3.0000  eta 16s\n"


def test_bar_on_a_terminal_leaves_whole_lines(monkeypatch):
    stderr = Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("NO_COLOR", "1")
    sink = ConsoleSink(total_steps=10, first_step=4, eta_s=lambda steps: None)
    sink.log({"step": 5, "loss/lm": 3.0})
    sink.advance(6)
    get_logger().info("a word in between")
    sink.close()
    screen = stderr.getvalue()
    lines = [line.split("\r")[-1] for line in screen.split("\n")]
    assert "step  5/10  loss 3.0000" in lines
    assert "a word in between" in lines
    assert "step 4/10 |" in screen
    assert not re.search(r"\x1b\[[0-9;]*m", screen)
    get_logger().info("after")
    assert stderr.getvalue().endswith("after\n")


def test_log_file_holds_what_the_console_said_over_attempts(tmp_path, capsys):
    path = tmp_path / "log.txt"
    for attempt in ("first", "second"):
        run_log = open_run_log(path, Redactor({}))
        get_logger().info("%s attempt", attempt)
        run_log.close()
        get_logger().info("not in the file")
    lines = path.read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["first attempt", "second attempt"]
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} ", line) for line in lines)
    assert capsys.readouterr().err.count("attempt\n") == 2


def test_log_file_holds_no_secrets_and_takes_any_text(tmp_path):
    path = tmp_path / "log.txt"
    run_log = open_run_log(path, Redactor({"WANDB_API_KEY": "0123456789secret"}))
    get_logger().info("key %s, token hf_%s, \udcff", "0123456789secret", "a" * 30)
    run_log.close()
    assert path.read_text().split(" ", 1)[1] == f"key {MASK}, token {MASK}, \\udcff\n"


def test_full_disk_is_said_once(tmp_path, capsys):
    run_log = open_run_log(tmp_path / "log.txt", Redactor({}))
    os.close(run_log._descriptor)
    run_log._descriptor = os.open("/dev/full", os.O_WRONLY)
    for number in range(3):
        get_logger().info("line %d", number)
    run_log.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("line 0")
    assert len(lines) == 4
    assert sum("cannot be written (No space left on device); training goes on" in line for line in lines) == 1


def test_unusable_log_file_is_one_line(tmp_path):
    (tmp_path / "log.txt").mkdir()
    with pytest.raises(StorageError, match=r"log\.txt: cannot be opened for the log"):
        open_run_log(tmp_path / "log.txt", Redactor({}))
    assert not any(type(handler).__name__ == "RunLog" for handler in logging.getLogger("qwen3next_train").handlers)
