"""Console output: a line per logged step, a live bar on a terminal, and ``log.txt``."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from qwen3next_train.errors import StorageError
from qwen3next_train.exhaustion import system_reason
from qwen3next_train.log import get_logger
from qwen3next_train.metrics.redaction import Redactor
from qwen3next_train.metrics.sinks import Record
from qwen3next_train.metrics.step_line import LINE_WIDTH, format_duration, format_evals, format_step

if TYPE_CHECKING:
    from tqdm import tqdm  # type: ignore[import-untyped]

_FILE_MODE = 0o640
_BAR_FORMAT = "step {n_fmt}/{total_fmt} |{bar}| {percentage:3.0f}%{postfix}"


class ConsoleSink:
    """One plain line per logged step through the package logger, and a live bar when stderr is a terminal.

    Nothing is coloured, so ``NO_COLOR`` has nothing to switch off.

    Args:
        total_steps: last step of the run.
        first_step: step the run goes on from, 0 for a new one.
        eta_s: seconds that a number of steps will take, None when not known yet (``Throughput.eta_s``).
        rate_unit: of the FLOP rate (:func:`~qwen3next_train.metrics.step_line.format_step`).
    """

    def __init__(
        self, *, total_steps: int, first_step: int, eta_s: Callable[[int], float | None], rate_unit: str = "FLOP/s"
    ) -> None:
        self._total_steps = total_steps
        self._eta_s = eta_s
        self._rate_unit = rate_unit
        self._bar: tqdm[object] | None = None
        if sys.stderr.isatty():
            self._bar = _open_bar(total_steps, first_step)
            get_logger().addFilter(self._clear_bar)

    def advance(self, step: int) -> None:
        """Move the live bar to ``step``; to be called for every step, logged or not."""
        if self._bar is not None:
            self._bar.set_postfix_str(self._eta(step), refresh=False)
            self._bar.update(step - self._bar.n)

    def log(self, record: Record) -> None:
        """Print the line of one logged step, and those of its validation."""
        step = int(record["step"])
        line = format_step(
            record,
            total_steps=self._total_steps,
            eta=self._eta(step),
            rate_unit=self._rate_unit,
            width=_line_width(),
        )
        get_logger().info("%s", line)
        for evaluated in format_evals(record, total_steps=self._total_steps):
            get_logger().info("%s", evaluated)
        self.advance(step)

    def close(self) -> None:
        """Take the live bar away."""
        if self._bar is not None:
            get_logger().removeFilter(self._clear_bar)
            self._bar.close()
            self._bar = None

    def _eta(self, step: int) -> str:
        seconds = self._eta_s(self._total_steps - step)
        return "" if seconds is None else f"eta {format_duration(seconds)}"

    def _clear_bar(self, record: logging.LogRecord) -> bool:
        """A logger filter that lets everything through: a line must not land behind the bar."""
        if self._bar is not None:
            self._bar.clear()
        return True


def _line_width() -> int:
    """Columns of the terminal; of a file or a pipe what a terminal usually has."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or LINE_WIDTH
    except (OSError, ValueError):
        return LINE_WIDTH


def _open_bar(total_steps: int, first_step: int) -> tqdm[object]:
    # Imported here: no run without a terminal needs it.
    from tqdm import tqdm

    return tqdm(
        total=total_steps,
        initial=first_step,
        file=sys.stderr,
        bar_format=_BAR_FORMAT,
        dynamic_ncols=True,
        leave=False,
    )


class RunLog(logging.Handler):
    """Appends what the console says to ``log.txt``, each line with its local time, secrets masked.

    Lines of all attempts of a run are in one file. A full disk is said once on the console and never stops
    the run; lines that do not fit are missing.

    Args:
        path: the file; created when missing.
        redactor: masks secrets.

    Raises:
        StorageError: when the file cannot be opened.
    """

    def __init__(self, path: Path, redactor: Redactor) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%Y-%m-%dT%H:%M:%S%z"))
        self._path = path
        self._redactor = redactor
        self._failing = False
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            self._descriptor = os.open(path, flags, _FILE_MODE)
        except OSError as error:
            raise StorageError(
                f"{path}: cannot be opened for the log ({system_reason(error)}); check permissions and free space"
            ) from error

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        if self._descriptor < 0:
            return
        line = self._redactor.text(self.format(record)) + "\n"
        try:
            os.write(self._descriptor, line.encode(errors="backslashreplace"))
            self._failing = False
        except OSError as error:
            if not self._failing:
                self._failing = True
                # Not through the logger, which would come back here.
                print(f"{self._path}: cannot be written ({system_reason(error)}); training goes on", file=sys.stderr)

    def close(self) -> None:
        """Stop taking records and close the file."""
        get_logger().removeHandler(self)
        self.acquire()
        try:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1
        finally:
            self.release()
        super().close()


def open_run_log(path: Path, redactor: Redactor) -> RunLog:
    """Send everything the package logger says to ``path`` as well, until the handler is closed.

    Raises:
        StorageError: when the file cannot be opened.
    """
    run_log = RunLog(path, redactor)
    get_logger().addHandler(run_log)
    return run_log
