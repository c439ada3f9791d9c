"""Stopping on request: signals become a flag that the loop reads at the end of a step.

Python runs a signal's handler only between two bytecodes of the main thread, which may be waiting inside a
collective for minutes. So a thread reads the signals as well (``signal.set_wakeup_fd``): it says what arrived,
ends the process while there is nothing to save yet, and later when a second request finds the main thread stuck.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from enum import Enum, auto
from types import FrameType, TracebackType
from typing import Any

from qwen3next_train.errors import ExitCode
from qwen3next_train.log import get_logger
from qwen3next_train.train.held_signals import STOP_SIGNALS

_FORCING_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT})
_REPEAT_WINDOW_S = 1.0
"""Within it, a repeated signal is an echo: torchrun and schedulers pass on what the process group got already."""

_STUCK_AFTER_S = 1.0
_PR_SET_PDEATHSIG = 1


class _Phase(Enum):
    """What a signal means."""

    PREPARING = auto()
    TRAINING = auto()
    CONCLUDED = auto()


class StopRequest:
    """Context manager that turns SIGTERM, SIGUSR1, SIGINT and SIGHUP into a request to save and stop.

    Until :meth:`defer` there is nothing to save: the first signal ends the process with code 75 from the watching
    thread, wherever the main thread is (a rendezvous, the tokenizer). After it, a signal is a flag, and a second
    SIGTERM or SIGINT more than a second after the first ends the process at once, the way the signal does by
    default. After :meth:`conclude` signals are ignored.

    SIGINT and SIGHUP that the process was started to ignore (``nohup``, a shell's background job) stay ignored.
    Forked children get the default behaviour back. To be entered by the main thread; leaving restores what was
    there, unless the attempt is concluded.

    Args:
        record_early_stop: told the signal's name before the process ends for want of anything to save; called in
            the watching thread.
    """

    def __init__(self, record_early_stop: Callable[[str], None]) -> None:
        self._record_early_stop = record_early_stop
        self._phase = _Phase.PREPARING
        # Held while the process is being ended, so that the main thread cannot enter the next phase meanwhile.
        self._phase_lock = threading.Lock()
        self._requested: signal.Signals | None = None
        self._main_escalation = _Escalation()
        self._previous: dict[signal.Signals, Any] = {}
        self._previous_wakeup = -1
        self._reader: socket.socket | None = None
        self._writer: socket.socket | None = None
        self._thread: threading.Thread | None = None
        # Any thread may fork, and a signal mask belongs to a thread.
        self._masks = threading.local()

    @property
    def requested(self) -> str | None:
        """Name of the first signal that asked to stop, such as ``SIGTERM``; None while none has."""
        return None if self._requested is None else self._requested.name

    def defer(self) -> None:
        """From now on there is something to save: signals wait for the end of a step."""
        with self._phase_lock:
            self._phase = _Phase.TRAINING

    def conclude(self) -> None:
        """The outcome is known: ignore the signals until the process has ended, so that its exit code stays."""
        with self._phase_lock:
            self._phase = _Phase.CONCLUDED
        for number in self._previous:
            signal.signal(number, signal.SIG_IGN)

    def __enter__(self) -> StopRequest:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._thread = threading.Thread(target=self._watch, args=(self._reader,), name="signals", daemon=True)
        self._thread.start()
        self._previous_wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            is_ignored = signal.getsignal(number) is signal.SIG_IGN
            if not (is_ignored and number in (signal.SIGINT, signal.SIGHUP)):
                self._previous[number] = signal.signal(number, self._handle)
        os.register_at_fork(
            before=self._hold_signals, after_in_parent=self._release_signals, after_in_child=self._leave_in_child
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._phase is not _Phase.CONCLUDED:
            for number, handler in self._previous.items():
                signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_wakeup)
        assert self._reader is not None
        assert self._writer is not None
        assert self._thread is not None
        self._writer.close()
        self._thread.join()
        self._reader.close()
        # Only now: the thread needs it to announce a signal that came at the very end.
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """In the main thread. Only sets the flag: logging here could interrupt logging."""
        number = signal.Signals(number)
        if self._main_escalation.forces(number):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._requested = self._requested or number

    def _stop_early(self, number: signal.Signals) -> None:
        """In the watching thread: end the process if there is nothing to save."""
        with self._phase_lock:
            if self._phase is not _Phase.PREPARING:
                return
            get_logger().info("%s received: nothing to save yet, stopping", number.name)
            self._record_early_stop(number.name)
            for stream in (sys.stdout, *get_logger().handlers):
                # What cannot be written any more must not keep the process alive.
                with suppress(OSError, ValueError):
                    stream.flush()
            # Neither an exception nor sys.exit reaches a main thread that waits inside C.
            os._exit(ExitCode.STOPPED)

    def _watch(self, reader: socket.socket) -> None:
        """In the watching thread, until the writing end is closed."""
        escalation = _Escalation()
        announced = False
        while numbers := reader.recv(64):
            for value in numbers:
                if value not in self._previous:
                    continue
                number = signal.Signals(value)
                self._stop_early(number)
                self._requested = self._requested or number
                if self._phase is _Phase.CONCLUDED:
                    continue
                if escalation.forces(number):
                    # The main thread ends the process the proper way, unless it is stuck.
                    time.sleep(_STUCK_AFTER_S)
                    os._exit(128 + number)
                if not announced:
                    announced = True
                    get_logger().info(
                        "%s received: saving at the end of this step and stopping; the same command continues the run",
                        number.name,
                    )

    def _hold_signals(self) -> None:
        """Before a fork: until its handlers are reset, a signal to the child would be read by this process."""
        if self._previous:
            self._masks.before_fork = signal.pthread_sigmask(signal.SIG_BLOCK, self._previous)

    def _release_signals(self) -> None:
        """After a fork, in the thread that forked, on both sides."""
        mask = self._masks.__dict__.pop("before_fork", None)
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _leave_in_child(self) -> None:
        """In a forked child: its signals are its own."""
        if self._previous:
            signal.set_wakeup_fd(-1)
            for number in self._previous:
                signal.signal(number, signal.SIG_DFL)
            self._previous = {}
        self._release_signals()


class _Escalation:
    """Tells a second, impatient signal from the echo of the first."""

    def __init__(self) -> None:
        self._first_at: float | None = None

    def forces(self, number: signal.Signals) -> bool:
        if number not in _FORCING_SIGNALS:
            return False
        now = time.monotonic()
        if self._first_at is None:
            self._first_at = now
        return now - self._first_at > _REPEAT_WINDOW_S


def stop_reason(signal_name: str, step: int | None) -> str:
    """The line that ends an attempt that was asked to stop.

    Args:
        signal_name: what asked.
        step: last finished step, None when the attempt has not made one.
    """
    when = "before the first step" if step is None else f"after step {step}"
    return f"stopped on {signal_name} {when}; run the same line to go on"


def die_with_parent() -> None:
    """Under torchrun on Linux, get SIGTERM when the agent dies, so that a killed agent leaves no orphans.

    Does nothing when the process was not started by torchrun (``TORCHELASTIC_RUN_ID`` is not set).
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or sys.platform != "linux":
        return
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0):
        get_logger().warning("prctl: %s; workers may outlive a killed torchrun", os.strerror(ctypes.get_errno()))
    elif os.getppid() != parent:
        # The agent died before the kernel knew whom to tell.
        signal.raise_signal(signal.SIGTERM)
