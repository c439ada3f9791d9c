"""Where a logged step's record goes: the ``Sink`` protocol and ``metrics.jsonl``."""

from __future__ import annotations

import errno
import json
import math
import os
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, Protocol

from qwen3next_train.errors import StorageError
from qwen3next_train.log import get_logger

Record = Mapping[str, float | int]
"""One logged step: values by metric name (``metrics.names``), ``step`` always among them."""

_FILE_MODE = 0o640
_MAX_PENDING_ROWS = 100_000


class Sink(Protocol):
    """A destination for records."""

    def log(self, record: Record) -> None:
        """Take one logged step. Never raises for a destination that is away or full."""

    def close(self) -> None:
        """Deliver what is still held back and release the destination."""


class JsonlSink:
    """``metrics.jsonl``: one JSON object per logged step, in step order, no step twice.

    Numbers are written so that reading gives back the same bits. JSON has no NaN or infinity: such a value is
    written as ``null``. Rows a dead attempt wrote after its last checkpoint are removed at the start, as is a
    line it did not finish. When the disk is full, rows are held back in memory and written once it is not.

    Args:
        path: the file; created when missing.
        resume_step: step the run goes on from; rows of later steps are removed. 0 for a new run: starts empty.

    Raises:
        StorageError: when the file cannot be opened or cut.
    """

    def __init__(self, path: Path, *, resume_step: int) -> None:
        self._path = path
        self._pending: deque[bytes] = deque(maxlen=_MAX_PENDING_ROWS)
        self._failing = False
        try:
            _drop_rows_after(path, resume_step)
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            self._descriptor = os.open(path, flags, _FILE_MODE)
            self._size = os.fstat(self._descriptor).st_size
        except OSError as error:
            raise StorageError(
                f"{path}: cannot be opened for metrics ({error.strerror}); check permissions and free space"
            ) from error

    def log(self, record: Record) -> None:
        """Append one row; a row that cannot be written now is written with a later one."""
        self._pending.append(encode_row(record))
        self._write_pending()

    def sync(self) -> None:
        """Force the rows to the device; called before a checkpoint that counts on them is published."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            self._report(error)

    def close(self) -> None:
        """Write what is held back, force it to the device and close the file."""
        self._write_pending()
        self.sync()
        os.close(self._descriptor)
        if self._pending:
            get_logger().warning("%s: %d rows could not be written and are lost", self._path, len(self._pending))

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


def encode_row(record: Record) -> bytes:
    """One line of ``metrics.jsonl``, newline included; NaN and infinity become ``null``."""
    row = {name: value if math.isfinite(value) else None for name, value in record.items()}
    return json.dumps(row, allow_nan=False, separators=(", ", ": ")).encode() + b"\n"


def _drop_rows_after(path: Path, resume_step: int) -> None:
    """Keep the whole rows up to ``resume_step``, in order and once each; replaces the file atomically."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return
    with os.fdopen(descriptor, "rb") as source:
        kept = sum(len(row) for row in _rows_to_keep(source, resume_step))
        if kept == os.fstat(source.fileno()).st_size:
            return
        source.seek(0)
        staged = path.with_name(f".{path.name}.tmp")
        staged.unlink(missing_ok=True)
        target = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, _FILE_MODE)
        with os.fdopen(target, "wb") as cut:
            cut.writelines(_rows_to_keep(source, resume_step))
            cut.flush()
            os.fsync(cut.fileno())
    staged.rename(path)
    get_logger().info("%s: rows after step %d and unreadable ones removed", path, resume_step)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _rows_to_keep(source: BinaryIO, resume_step: int) -> Iterator[bytes]:
    last_step = -1
    for row in source:
        step = _step_of(row)
        if step is not None and last_step < step <= resume_step and resume_step > 0:
            last_step = step
            yield row


def _step_of(text: bytes) -> int | None:
    """The row's step, None for a line that is torn or damaged."""
    if not text.endswith(b"\n"):
        return None
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return step if isinstance(step, int) and not isinstance(step, bool) else None
