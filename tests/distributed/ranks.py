"""Rank processes that stay: started once for each number of ranks, they do one task after the other.

Each process that is started imports torch and DeepSpeed and compiles nothing twice: some eight seconds of a core, more
than most tasks take. :func:`perform` gives a task to the ranks and waits for it. A task is a module of this folder with
a function ``perform(context, *arguments)``, which every rank calls.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from tests.integration.launching import REPOSITORY, environment

_POLL_S = 0.05


class _Ranks:
    """The processes of one world."""

    def __init__(self, num_processes: int) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        self._log = self._folder / "log"
        self._num_tasks = 0
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [*torchrun, "-m", "tests.distributed.ranks", str(self._folder), str(os.getpid())],
                cwd=REPOSITORY,
                env=environment(),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def perform(self, module: str, arguments: list[str], timeout: float) -> None:
        """Have the task done; an AssertionError with what the ranks printed where they failed or took too long."""
        self._num_tasks += 1
        task = self._folder / f"{self._num_tasks}.json"
        hidden = task.with_suffix(".part")
        hidden.write_text(json.dumps({"module": module, "arguments": arguments}))
        hidden.rename(task)
        deadline = time.monotonic() + timeout
        while not task.with_suffix(".done").exists():
            ended = self._process.poll() is not None
            if ended or time.monotonic() > deadline:
                printed = self._log.read_text()
                self.close()
                why = "ended" if ended else f"took more than {timeout:g} s"
                raise AssertionError(f"{module}: the ranks {why}\n{printed}")
            time.sleep(_POLL_S)

    def close(self) -> None:
        """End the processes and forget them."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)
        for number, ranks in list(_started.items()):
            if ranks is self:
                del _started[number]


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


@atexit.register
def _close_all() -> None:
    for ranks in list(_started.values()):
        ranks.close()


def _serve(folder: Path, parent: int) -> None:
    """What each rank does until its folder or the process that started it is gone."""
    import torch

    from qwen3next_train.parallel.process_groups import process_context

    torch.set_num_threads(1)
    with process_context("cpu") as context:
        number = 1
        while folder.exists() and Path(f"/proc/{parent}").exists():
            task = folder / f"{number}.json"
            if not task.exists():
                time.sleep(_POLL_S)
                continue
            described = json.loads(task.read_text())
            importlib.import_module(f"tests.distributed.{described['module']}").perform(
                context, *described["arguments"]
            )
            # Done when all are: nobody begins the next while another still writes.
            context.control.any_true(False)
            if context.rank == 0:
                task.with_suffix(".done").touch()
            number += 1


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), int(sys.argv[2]))
