"""Standard streams as they were given: closed, full, broken, ASCII only. None of it may change what a run does."""

from __future__ import annotations

import io
import os
import select
import sys
from typing import TextIO

_FALLBACK_ENCODING = "utf-8"


class _Output(io.FileIO):
    """Output that is never an error for whoever writes: the first failure is kept, what follows it is dropped."""

    failure: OSError | None = None

    def write(self, data: object) -> int:
        """Write, waiting for a reader of a pipe that does not block."""
        size = memoryview(data).nbytes  # type: ignore[arg-type]
        if self.failure is not None:
            return size
        try:
            while (written := super().write(data)) is None:  # type: ignore[arg-type]
                select.select((), (self,), ())
        except OSError as error:
            self.failure = error
            return size
        return written


def prepare_streams() -> None:
    """Make descriptors 0 to 2 exist and standard output and error fit for any text; to be called first of all.

    A file that is opened while one of them is closed would get its number, and then whatever is printed.
    Streams that something else has taken the place of (a test's) are left alone.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number, which is this one.
            os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(number, True)
    if sys.stdin is None:
        sys.stdin = open(0, encoding=_FALLBACK_ENCODING, closefd=False)  # noqa: SIM115 - as long as the process
    if sys.stdout is sys.__stdout__:
        sys.stdout = _writer(1, sys.stdout, line_buffering=os.isatty(1))
    if sys.stderr is sys.__stderr__:
        sys.stderr = _writer(2, sys.stderr, line_buffering=True)


def failure_of(stream: TextIO) -> OSError | None:
    """Flush a stream; why it could not be written, None when it could."""
    try:
        stream.flush()
    except OSError as error:
        return error
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return raw.failure if isinstance(raw, _Output) else None


def _writer(number: int, given: TextIO | None, *, line_buffering: bool) -> TextIO:
    encoding = _FALLBACK_ENCODING if given is None else given.encoding
    try:
        raw = _Output(number, "w", closefd=False)
    except OSError:
        # Not a file that can be written to at all, such as a folder.
        raw = _Output(os.devnull, "w")
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=encoding, errors="backslashreplace", line_buffering=line_buffering
    )
