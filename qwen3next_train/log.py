"""The one logger of the package: plain lines on stderr from rank 0, errors from every rank.

``metrics.console`` adds the run directory's ``log.txt`` as a second handler.
"""

from __future__ import annotations

import logging
import os
import sys

LOGGER_NAME = "qwen3next_train"


class _StderrHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Looks up ``sys.stderr`` at every record, so that redirections (tests, progress bars) are honoured."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self):  # type: ignore[no-untyped-def]
        """The current ``sys.stderr``."""
        return sys.stderr


def rank_prefix() -> str:
    """What lines of other ranks than the first begin with; a ``RANK`` that is no number is rejected elsewhere."""
    rank = os.environ.get("RANK", "")
    return f"[rank {rank}] " if rank.isascii() and rank.isdecimal() and rank.strip("0") else ""


def get_logger() -> logging.Logger:
    """Return the package logger, configured on first use from the ``RANK`` environment variable."""
    logger = logging.getLogger(LOGGER_NAME)
    if not logger.handlers:
        handler = _StderrHandler()
        prefix = rank_prefix()
        handler.setFormatter(logging.Formatter(prefix + "%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.ERROR if prefix else logging.INFO)
        logger.propagate = False
    return logger
