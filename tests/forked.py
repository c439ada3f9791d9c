"""Processes forked from one that has imported what training needs (``preloaded``), which takes seconds of a core.

For what runs in a process of its own but does not ask how that process came to be.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Self

CONTEXT = multiprocessing.get_context("forkserver")
"""For what starts processes by a context that it is given."""
CONTEXT.set_forkserver_preload(["tests.preloaded"])


def start(function: Callable[..., None], *arguments: object) -> BaseProcess:
    """Call a function in a process of its own, which ends with this one."""
    process = CONTEXT.Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


def pipe() -> tuple[Connection, Connection]:
    """Two ends of a connection; one may be an argument of :func:`start`."""
    return CONTEXT.Pipe()


class Apart:
    """Functions called in one process apart from this one, one after the other; a context manager.

    Args:
        prepare: called there before anything else.
    """

    def __init__(self, prepare: Callable[[], None] | None = None) -> None:
        self._connection, theirs = pipe()
        self._process = start(_answer, theirs)
        theirs.close()
        if prepare is not None:
            self.call(prepare)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join()

    def call(self, function: Callable[..., Any], *arguments: object, **named: object) -> Any:
        """What the function returns; an AssertionError with the traceback of what it raises."""
        self._connection.send((function, arguments, named))
        returned, failure = self._connection.recv()
        assert failure is None, failure
        return returned


def _answer(connection: Connection) -> None:
    while True:
        try:
            function, arguments, named = connection.recv()
        except EOFError:
            # Without what libraries do at the end of a program.
            os._exit(0)
        try:
            connection.send((function(*arguments, **named), None))
        except Exception:
            connection.send((None, traceback.format_exc()))
