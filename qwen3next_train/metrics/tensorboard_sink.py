"""TensorBoard's event files, by tensorboardX, which is imported here and nowhere else, and only when asked for.

Of the library this takes the format, not the writer: that one hands events to a thread through a queue of bounded
length, and training would wait for ever behind a disk that is full.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import socket
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen3next_train.errors import ConfigError, StorageError
from qwen3next_train.exhaustion import system_reason
from qwen3next_train.log import get_logger
from qwen3next_train.metrics.history import open_file
from qwen3next_train.metrics.samples import Sample
from qwen3next_train.metrics.sinks import Record

FOLDER_NAME = "tensorboard"

_FILES = "events.out.tfevents.*"
_FORMAT = "brain.Event:2"
_HEADER = struct.Struct("<QI")
_CHECKSUM = struct.Struct("<I")
_MAX_EVENT_BYTES = 64 << 20


def require_library(is_asked_for: bool) -> None:
    """Reject ``logging.tensorboard`` where tensorboardX is missing, before anything is built.

    Raises:
        ConfigError: names the extra.
    """
    if is_asked_for and importlib.util.find_spec("tensorboardX") is None:
        raise ConfigError(
            "logging.tensorboard: tensorboardX is not installed; pip install 'qwen3next-train[tensorboardx]', or set "
            "it to false"
        )


class TensorBoardSink:
    """Writes each row as one event, under the names of ``metrics.jsonl``; for rank 0 only.

    Every attempt has a file of its own, as TensorBoard expects. What earlier attempts wrote after the checkpoint that
    the run goes on from is cut off, so no step is there twice; a TensorBoard that has shown it already is told to
    forget it. A disk that is full costs rows here (``metrics.jsonl`` catches up), never the run.

    Args:
        folder: where the files are; created.
        resume_step: step the run goes on from, 0 for a new run.

    Raises:
        StorageError: they cannot be cut or made.
    """

    def __init__(self, folder: Path, *, resume_step: int) -> None:
        # Here, since it takes a second that no other run should spend.
        from tensorboardX.proto import event_pb2

        self._protocol: Any = event_pb2
        self._failing = False
        self._size = 0
        host = "".join(letter if letter.isalnum() else "-" for letter in socket.gethostname())
        # TensorBoard reads the files of a folder in the order of their names.
        self._path = folder / f"events.out.tfevents.{int(time.time()):010d}.{host}.{os.getpid()}"
        try:
            folder.mkdir(exist_ok=True)
            for path in sorted(folder.glob(_FILES)):
                self._cut(path, resume_step)
            self._descriptor = open_file(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        except OSError as error:
            raise StorageError(
                f"{folder}: cannot be written ({system_reason(error)}); free space, fix permissions, or set "
                "logging.tensorboard to false"
            ) from error
        self._write(event_pb2.Event(wall_time=time.time(), file_version=_FORMAT))
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(event_pb2.Event(wall_time=time.time(), step=resume_step + 1, session_log=start))

    def log(self, record: Record) -> None:
        """Write one row; a row that cannot be written is left out."""
        event = self._protocol.Event(wall_time=time.time(), step=int(record["step"]))
        for name, value in record.items():
            if name != "step":
                event.summary.value.add(tag=name, simple_value=value)
        self._write(event)

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Write samples as text, which TensorBoard takes for Markdown: as blocks of code."""
        from tensorboardX.summary import text

        event = self._protocol.Event(wall_time=time.time(), step=step)
        for number, sample in enumerate(samples, start=1):
            block = "".join(f"    {line}\n" for line in (sample.prompt + sample.text).split("\n"))
            event.summary.MergeFrom(text(f"samples/{number}", block))
        self._write(event)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _write(self, event: Any) -> None:
        record = _framed(event.SerializeToString())
        try:
            if self._failing:
                # The part of an event that a full disk still took.
                os.ftruncate(self._descriptor, self._size)
            if os.write(self._descriptor, record) < len(record):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if not self._failing:
                self._failing = True
                get_logger().warning(
                    "%s: cannot be written (%s); training goes on, rows are missing here", self._path, error.strerror
                )
            return
        self._failing = False
        self._size += len(record)

    def _cut(self, path: Path, resume_step: int) -> None:
        """Keep the events up to a step; without any the file goes."""
        end, num_kept = 0, 0
        with os.fdopen(open_file(path, os.O_RDONLY), "rb") as source:
            while (event := self._read(source)) is not None and event.step <= resume_step:
                end = source.tell()
                num_kept += event.HasField("summary")
        if num_kept:
            os.truncate(path, end)
        else:
            path.unlink()

    def _read(self, source: Any) -> Any:
        """The next event; None at the end, or where one is torn or damaged."""
        header = source.read(_HEADER.size)
        if len(header) < _HEADER.size:
            return None
        length, _ = _HEADER.unpack(header)
        data = source.read(length + _CHECKSUM.size) if length <= _MAX_EVENT_BYTES else b""
        if len(data) < length + _CHECKSUM.size:
            return None
        try:
            return self._protocol.Event.FromString(data[:length])
        except Exception:  # noqa: BLE001 - protobuf's own kinds, whose package is the library's affair
            return None


def _framed(data: bytes) -> bytes:
    """A record of TFRecord's format: length, its checksum, data, its checksum."""
    from tensorboardX.record_writer import masked_crc32c

    length = struct.pack("<Q", len(data))
    return length + _CHECKSUM.pack(masked_crc32c(length)) + data + _CHECKSUM.pack(masked_crc32c(data))
