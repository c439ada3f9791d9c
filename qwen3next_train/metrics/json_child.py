"""A child process that exchanges JSON lines with its parent, which never depends on an answer."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

_CHUNK_BYTES = 1 << 16


class JsonChild:
    """A Python module run as a process of its own, with a pipe in each direction.

    It lives in its own session, so that Ctrl-C and a scheduler's signals to training's process group pass it by,
    and sees the end of its input when this process dies, however that happens.

    Args:
        module: what ``python -m`` runs.
        log_path: receives what the child writes to stderr.
        hidden: environment variables that the child does not get.

    Raises:
        OSError: the process cannot be started.
    """

    def __init__(self, module: str, log_path: Path, hidden: Collection[str] = ()) -> None:
        package_root = Path(__file__).parents[2]
        path = os.pathsep.join(filter(None, [str(package_root), os.environ.get("PYTHONPATH", "")]))
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                # -P: nothing in the user's working directory may shadow a module.
                [sys.executable, "-P", "-m", module],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={name: text for name, text in os.environ.items() if name not in hidden} | {"PYTHONPATH": path},
                start_new_session=True,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests = self._process.stdin
        self._replies = LineReader(self._process.stdout.fileno())

    def send(self, message: dict[str, Any]) -> None:
        """Write one message; waits while the child does not read.

        Raises:
            OSError: the process is gone.
        """
        rest = memoryview(json.dumps(message).encode() + b"\n")
        while rest:
            rest = rest[os.write(self._requests.fileno(), rest) :]

    def receive(self, timeout_s: float) -> dict[str, str]:
        """The next reply; empty when none came in time or the process is gone.

        Raises:
            ValueError: the reply is not JSON.
        """
        deadline = time.monotonic() + timeout_s
        line = self._replies.read(timeout_s)
        while line is None and not self._replies.at_end and time.monotonic() < deadline:
            line = self._replies.read(deadline - time.monotonic())
        return {} if line is None else dict(json.loads(line))

    def fate(self, otherwise: str) -> str:
        """How the process ended, or ``otherwise`` while it runs."""
        code = self._process.poll()
        return otherwise if code is None else f"process ended with code {code}"

    def kill(self) -> None:
        """End the process and its group now; safe while another thread is in :meth:`send` or :meth:`receive`."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def close(self) -> None:
        """End the process and close the pipes; for the thread that sends and receives."""
        self.kill()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._requests.close()


class LineReader:
    """Whole lines from a pipe, with a time limit.

    Args:
        descriptor: open for reading; stays the caller's.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._buffer = b""
        self.at_end = False

    def read(self, timeout_s: float) -> bytes | None:
        """The next line without its newline; None when nothing comes for ``timeout_s`` seconds, or at the end."""
        while b"\n" not in self._buffer:
            if self.at_end or not select.select([self._descriptor], [], [], max(timeout_s, 0))[0]:
                return None
            chunk = os.read(self._descriptor, _CHUNK_BYTES)
            self.at_end = not chunk
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line
