"""Progress through a source of text: a live line on a terminal, a plain line now and then elsewhere, on one rank."""

from __future__ import annotations

import datetime
import logging
import sys
import time

from qwen3next_train.log import get_logger

_LIVE_INTERVAL_S = 0.2
_PLAIN_INTERVAL_S = 10.0


class Progress:
    """Reports how far the reading of one source is, and how fast it goes.

    Args:
        label: the source's name, at the start of every line.
        total_bytes: stored bytes of all its files.
        start_bytes: those that an earlier, interrupted call has done.
        unit: what is counted.
    """

    def __init__(self, label: str, total_bytes: int, start_bytes: int = 0, *, unit: str = "tokens") -> None:
        self._label = label
        self._total_bytes = total_bytes
        self._start_bytes = start_bytes
        self._unit = unit
        self._live = sys.stderr.isatty()
        self._enabled = get_logger().isEnabledFor(logging.INFO)
        self._started_at = self._shown_at = time.monotonic()
        self._width = 0

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started_at

    def update(self, num_done: int, num_bytes: int, text_bytes: int) -> None:
        """Show the state if the last report is old enough.

        Args:
            num_done: tokens, or what else is counted, of the source so far.
            num_bytes: stored bytes of its files so far, those done earlier included.
            text_bytes: bytes of text that this call has been through, more than the stored ones of compressed files.
        """
        now = time.monotonic()
        if self._enabled and now - self._shown_at >= (_LIVE_INTERVAL_S if self._live else _PLAIN_INTERVAL_S):
            self._shown_at = now
            line = f"{self._label}: {self.state(num_done, num_bytes, text_bytes, self.elapsed_s)}"
            if self._live:
                sys.stderr.write("\r" + line.ljust(self._width))
                sys.stderr.flush()
                self._width = len(line)
            else:
                get_logger().info("%s", line)

    def state(self, num_done: int, num_bytes: int, text_bytes: int, elapsed_s: float) -> str:
        """``12 %, 3,456 tokens, 7.8 MB/s, 0:01:02 left`` after ``elapsed_s``; the time left where it can be told."""
        done = min(num_bytes, self._total_bytes)
        parts = [f"{100 * done // max(1, self._total_bytes)} %", f"{num_done:,} {self._unit}"]
        rate = (done - self._start_bytes) / elapsed_s if elapsed_s > 0 else 0.0
        if rate > 0:
            left = datetime.timedelta(seconds=round((self._total_bytes - done) / rate))
            parts += [f"{text_bytes / 1e6 / elapsed_s:.1f} MB/s", f"{left} left"]
        return ", ".join(parts)

    def close(self) -> None:
        """Wipe the live line."""
        if self._width:
            sys.stderr.write("\r" + " " * self._width + "\r")
            sys.stderr.flush()
            self._width = 0
