"""Processes forked from one that has imported torch and DeepSpeed (``preloaded``), some five seconds of a core each.

For what runs in a process of its own but does not ask how that process came to be.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

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
