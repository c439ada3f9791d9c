"""Signals that ask to stop wait in the kernel until there is a handler. Imports nothing else: it comes first."""

from __future__ import annotations

import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
"""Those that ask a run to save and stop."""


def hold_stop_signals() -> None:
    """Let signals that ask to stop wait from now on; to be called first of all, by the main thread.

    They wait in the kernel, so none is lost before there is a handler and a place to record the stop.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def release_stop_signals() -> None:
    """Deliver the signals that have waited since :func:`hold_stop_signals`, and those to come."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def drop_held_signals() -> None:
    """Forget the signals that still wait, because the outcome is known, and hold no more."""
    late = signal.sigpending().intersection(STOP_SIGNALS)
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in late}
    release_stop_signals()
    for number, handler in handlers.items():
        signal.signal(number, handler)
