"""Where a logged step's record goes: the ``Sink`` protocol and files of one row a step, such as ``metrics.jsonl``."""

from __future__ import annotations

import errno
import json
import math
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from qwen3next_train.errors import StorageError
from qwen3next_train.exhaustion import system_reason
from qwen3next_train.log import get_logger
from qwen3next_train.metrics.history import Row, content, cut_rows, open_file, replace_file

Record = Mapping[str, float | int]
"""One logged step: values by metric name (``metrics.names``), ``step`` always among them."""

_MAX_PENDING_ROWS = 100_000
# Readable, so that the rows can be had back when somebody deletes the name.
_APPENDING = os.O_RDWR | os.O_APPEND | os.O_CREAT


class Sink(Protocol):
    """A destination for records."""

    def log(self, record: Record) -> None:
        """Take one logged step. Never raises for a destination that is away or full."""

    def close(self) -> None:
        """Deliver what is still held back and release the destination."""


class JsonlSink:
    """``metrics.jsonl`` or ``samples.jsonl``: one JSON object per step, in step order, no step twice.

    Numbers are written so that reading gives back the same bits. JSON has no NaN or infinity: such a value is
    written as ``null``. Rows a dead attempt wrote after its last checkpoint are removed at the start, as is a
    line it did not finish; what is lost or damaged before it is said. When the disk is full, rows are held back in
    memory and written once it is not.

    Args:
        path: the file; created when missing.
        resume_step: step the run goes on from; rows of later steps are removed. 0 for a new run: starts empty.
        due: the steps up to it that earlier attempts have logged, as far as they are known.
        on_kept: called with every row of earlier attempts that is kept, in order.

    Raises:
        StorageError: when the file cannot be opened or cut.
    """

    def __init__(
        self,
        path: Path,
        *,
        resume_step: int,
        due: Sequence[range] = (),
        on_kept: Callable[[Row], None] | None = None,
    ) -> None:
        self._path = path
        self._pending: deque[bytes] = deque(maxlen=_MAX_PENDING_ROWS)
        self._failing = False
        try:
            cut_rows(path, resume_step, due, on_kept)
            self._descriptor = open_file(path, _APPENDING)
            self._size = os.fstat(self._descriptor).st_size
        except OSError as error:
            raise StorageError(
                f"{path}: cannot be opened ({system_reason(error)}); check permissions and free space"
            ) from error

    def log(self, record: Row) -> None:
        """Append one row; a row that cannot be written now is written with a later one."""
        self._pending.append(encode_row(record))
        self._write_pending()

    def sync(self) -> None:
        """Force the rows to the device; called before a checkpoint that counts on them is published.

        A file that was deleted or replaced under the run is made again from the rows written so far.

        Raises:
            StorageError: rows are in memory only, or cannot be forced to the device.
        """
        try:
            self._restore()
            self._write_pending()
            os.fsync(self._descriptor)
        except OSError as error:
            raise StorageError(f"{self._path}: cannot be written ({system_reason(error)})") from error
        if self._pending:
            rows = "1 row is" if len(self._pending) == 1 else f"{len(self._pending)} rows are"
            raise StorageError(f"{self._path}: cannot be written; {rows} in memory only; free space")

    def close(self) -> None:
        """Write what is held back, force it to the device and close the file."""
        self._write_pending()
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            self._report(error)
        os.close(self._descriptor)
        if self._pending:
            get_logger().warning("%s: %d rows could not be written and are lost", self._path, len(self._pending))

    def _restore(self) -> None:
        try:
            if os.path.samestat(os.fstat(self._descriptor), os.lstat(self._path)):
                return
        except FileNotFoundError:
            is_replaced = False
        else:
            is_replaced = True
        aside = replace_file(self._path, content(self._descriptor, self._size), keep_old=is_replaced)
        what = "deleted" if aside is None else f"replaced (kept as {aside.name})"
        get_logger().warning("%s: %s under the run; made again with the rows so far", self._path, what)
        descriptor = open_file(self._path, _APPENDING)
        os.close(self._descriptor)
        self._descriptor = descriptor

    def _write_pending(self) -> None:
        if not self._pending:
            return
        rows = b"".join(self._pending)
        try:
            if self._failing:
                # The part of a row that a full disk still took.
                os.ftruncate(self._descriptor, self._size)
            # One system call, so that a kill leaves whole rows (or a torn last one, cut at the next start).
            if os.write(self._descriptor, rows) < len(rows):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._report(error)
            return
        self._size += len(rows)
        if self._failing:
            get_logger().warning("%s: writing again, %d rows caught up", self._path, len(self._pending))
            self._failing = False
        self._pending.clear()

    def _report(self, error: OSError) -> None:
        if not self._failing:
            self._failing = True
            get_logger().warning(
                "%s: cannot be written (%s); training goes on, rows are kept in memory and written later",
                self._path,
                error.strerror,
            )


def encode_row(record: Row) -> bytes:
    """One line, newline included; NaN and infinity become ``null``."""
    row = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }
    return json.dumps(row, allow_nan=False, separators=(", ", ": ")).encode() + b"\n"
