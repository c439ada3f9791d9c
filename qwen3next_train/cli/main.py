"""Entry point. Before anything else is imported, which takes as long as Python's start, signals are held."""

from __future__ import annotations

from qwen3next_train.train.held_signals import drop_held_signals, hold_stop_signals

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line.

    Args:
        argv: arguments after the program's name; None takes ``sys.argv``.

    Returns:
        The exit code (``errors.ExitCode``, or 130 after Ctrl-C outside of training).
    """
    # Until the run directory is open: then a request to stop can be recorded.
    hold_stop_signals()
    try:
        from qwen3next_train.cli.outcome import run_command_line

        return run_command_line(argv)
    finally:
        drop_held_signals()
