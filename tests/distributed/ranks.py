"""Rank processes that stay: started once for each number of ranks, they do one task after the other.

They are forked (:mod:`tests.forked`). :func:`perform` gives a task to the ranks and waits for it. A task is a module of
this folder with a function ``perform(context, *arguments)``, which every rank calls.
"""

from __future__ import annotations

import importlib
import os
import tempfile
import time
from multiprocessing.connection import Connection, wait
from pathlib import Path

from tests.forked import pipe, start
from tests.integration.launching import free_port


class _Ranks:
    """The processes of one world."""

    def __init__(self, num_processes: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._log = Path(self._folder.name) / "log"
        self._log.touch()
        self._processes, self._connections = [], []
        port = free_port()
        for rank in range(num_processes):
            ours, theirs = pipe()
            launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes}
            launched |= {"LOCAL_WORLD_SIZE": num_processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            variables = {name: str(value) for name, value in launched.items()}
            self._processes.append(start(_serve, theirs, variables, self._log))
            self._connections.append(ours)
            # The rank's end is the rank's alone, so that its death is the end of the connection.
            theirs.close()

    def perform(self, module: str, arguments: list[str], timeout: float) -> None:
        """Have the task done; an AssertionError with what the ranks printed where they failed or took too long."""
        deadline = time.monotonic() + timeout
        try:
            for connection in self._connections:
                connection.send((module, arguments))
            busy = list(self._connections)
            while busy:
                answered = wait(busy, max(0.0, deadline - time.monotonic()))
                if not answered:
                    self._fail(module, f"took more than {timeout:g} s")
                for connection in answered:
                    assert isinstance(connection, Connection)
                    connection.recv()
                    busy.remove(connection)
        except (EOFError, OSError):
            self._fail(module, "ended")

    def _fail(self, module: str, why: str) -> None:
        self.close()
        raise AssertionError(f"{module}: the ranks {why}\n{self._log.read_text()}") from None

    def close(self) -> None:
        """End the processes and forget them."""
        del _started[len(self._processes)]
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()


_started: dict[int, _Ranks] = {}


def perform(module: str, *arguments: object, num_processes: int, timeout: float = 280) -> None:
    """Have ``tests.distributed.<module>.perform(context, *arguments)`` called by every rank.

    Args:
        module: file of this folder.
        arguments: handed over as text.
        num_processes: number of ranks.
        timeout: seconds, for the task and, the first time, the start.
    """
    if num_processes not in _started:
        _started[num_processes] = _Ranks(num_processes)
    _started[num_processes].perform(module, [str(argument) for argument in arguments], timeout)


def end_all() -> None:
    """End all rank processes; the next task starts new ones."""
    for ranks in list(_started.values()):
        ranks.close()


def _serve(connection: Connection, variables: dict[str, str], log: Path) -> None:
    """What each rank does until the process that started it is gone."""
    import torch

    from qwen3next_train.parallel.process_groups import process_context

    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ.update(variables)
    torch.set_num_threads(1)
    with process_context("cpu") as context:
        while True:
            try:
                module, arguments = connection.recv()
            except EOFError:
                # Not through the collectives at the end of the context: others may be gone already.
                os._exit(0)
            importlib.import_module(f"tests.distributed.{module}").perform(context, *arguments)
            connection.send(None)
