"""Progress of tokenisation: a live line on a terminal, a plain line now and then elsewhere, nothing on other ranks."""

from __future__ import annotations

import logging
import sys
import time

from qwen3next_train.log import get_logger

_LIVE_INTERVAL_S = 0.2
_PLAIN_INTERVAL_S = 10.0


class Progress:
    """Reports tokens and throughput of one source.

    Args:
        label: the source's name, at the start of every line.
    """

    def __init__(self, label: str) -> None:
        self._label = label
        self._live = sys.stderr.isatty()
        self._enabled = get_logger().isEnabledFor(logging.INFO)
        self._started_at = self._shown_at = time.monotonic()
        self._width = 0

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started_at

    def update(self, num_tokens: int, num_bytes: int) -> None:
        """Show the totals so far if the last report is old enough."""
        now = time.monotonic()
        if self._enabled and now - self._shown_at >= (_LIVE_INTERVAL_S if self._live else _PLAIN_INTERVAL_S):
            self._shown_at = now
            line = f"{self._label}: {num_tokens:,} tokens, {num_bytes / 1e6 / self.elapsed_s:.1f} MB/s"
            if self._live:
                sys.stderr.write("\r" + line.ljust(self._width))
                sys.stderr.flush()
                self._width = len(line)
            else:
                get_logger().info("%s", line)

    def close(self) -> None:
        """Wipe the live line."""
        if self._width:
            sys.stderr.write("\r" + " " * self._width + "\r")
            sys.stderr.flush()
            self._width = 0
