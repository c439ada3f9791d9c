"""Forwards signals from the launcher to the processes it has started; while there are none, they end the launcher.

Left to torchrun, an echo of the first signal (schedulers send to the launcher, to its process group and through its
parent) would end it while the workers save, and it does not look at signals until the workers are started.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType

from qwen3next_train.train.held_signals import STOP_SIGNALS, release_stop_signals


class SignalForwarding:
    """Context manager that passes on the signals that ask a run to stop.

    A thread reads them, as the main thread may wait inside a rendezvous. SIGINT and SIGHUP that the process was
    started to ignore stay ignored. The main thread must enter it; after it exits, the
    signals are ignored, so that the exit code does not change.

    Args:
        conclude_early: called in the watching thread with the signal's name when no process has started yet; the
            launcher then exits with the code it returns.
    """

    def __init__(self, conclude_early: Callable[[str], int]) -> None:
        self._conclude_early = conclude_early
        self._requested: signal.Signals | None = None
        self._handled: list[signal.Signals] = []
        self._previous_wakeup = -1
        self._reader, self._writer = socket.socketpair()
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)

    @property
    def requested(self) -> str | None:
        """Name of the first signal that was passed on; None while none was."""
        return None if self._requested is None else self._requested.name

    def __enter__(self) -> SignalForwarding:
        self._writer.setblocking(False)
        self._thread.start()
        self._previous_wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            is_ignored = signal.getsignal(number) is signal.SIG_IGN
            if not (is_ignored and number in (signal.SIGINT, signal.SIGHUP)):
                self._handled.append(number)
                signal.signal(number, _leave_to_thread)
        release_stop_signals()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number in self._handled:
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(self._previous_wakeup)
        self._writer.close()
        self._thread.join()
        self._reader.close()

    def _watch(self) -> None:
        """In the watching thread, until the writing end is closed."""
        while numbers := self._reader.recv(64):
            for value in numbers:
                if value in self._handled:
                    self._pass_on(signal.Signals(value))

    def _pass_on(self, number: signal.Signals) -> None:
        self._requested = self._requested or number
        children = child_processes()
        if not children:
            # Neither an exception nor sys.exit reaches a main thread that waits inside C.
            os._exit(self._conclude_early(number.name))
        for pid in children:
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def child_processes() -> list[int]:
    """Processes started by this one that have not ended."""
    return [int(path.name) for path in Path("/proc").glob("[0-9]*") if _is_live_child(path)]


def _is_live_child(path: Path) -> bool:
    try:
        # The name, in parentheses, may hold anything; state and parent follow it.
        state, parent = (path / "stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return False
    return int(parent) == os.getpid() and state not in "ZX"


def _leave_to_thread(number: int, frame: FrameType | None) -> None:
    """Does nothing, but there must be a handler, or the signal has its default effect."""
