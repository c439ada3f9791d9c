import io
import logging
import os
import re
import sys
import termios
from contextlib import suppress

import pytest

from qwen3next_train.errors import StorageError
from qwen3next_train.log import get_logger
from qwen3next_train.metrics.console import ConsoleSink, open_run_log
from qwen3next_train.metrics.redaction import MASK, Redactor


class Terminal(io.StringIO):
    """A stderr that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_plain_lines_and_no_bar_without_a_terminal(monkeypatch):
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    sink = ConsoleSink(total_steps=10, first_step=0, eta_s=lambda steps: steps * 2.0)
    for step in (1, 2):
        sink.log({"step": step, "loss/lm": 3.0})
        sink.advance(step)
    sink.close()
    assert stderr.getvalue() == "step  1/10  loss 3.0000  eta 18s\nstep  2/10  loss 3.0000  eta 16s\n"


def test_a_validation_has_a_line_of_its_own(monkeypatch):
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    sink = ConsoleSink(total_steps=10, first_step=0, eta_s=lambda steps: None)
    sink.log({"step": 2, "loss/lm": 3.0, "eval/loss": 1.5, "eval/bpb": 0.75})
    assert stderr.getvalue() == "step  2/10  loss 3.0000\neval  2/10  loss 1.5000  0.7500 bits/byte\n"


@pytest.mark.parametrize(("columns", "shown"), [(160, True), (100, False), (0, False)])
def test_a_wide_terminal_gets_more(monkeypatch, columns, shown):
    """A pseudo-terminal that has no size counts as one of 100 columns."""
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (24, columns))
    with os.fdopen(master, "rb", buffering=0) as screen:
        with os.fdopen(slave, "w") as stderr:
            monkeypatch.setattr(sys, "stderr", stderr)
            sink = ConsoleSink(total_steps=10, first_step=0, eta_s=lambda steps: None)
            numbers = {"optim/lr": 1e-3, "optim/grad_norm": 1.0, "perf/tokens_per_s": 1e6, "perf/tflops_per_gpu": 400.0}
            record = {"step": 2, "loss/lm": 3.0, "loss/mtp": 3.5, "perf/flops_per_step": 1e15, "perf/mfu": 0.4}
            sink.log(record | numbers)
            sink.close()
            monkeypatch.undo()
        printed = b""
        # The terminal hands over what it has, piece by piece, and an error once everything was read.
        with suppress(OSError):
            while piece := screen.read(4096):
                printed += piece
        assert (b"mtp 3.5000" in printed) == shown


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
