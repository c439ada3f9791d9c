"""Trainings of curves, part by part, in rank processes that stay: what ``bench_curves.py`` has trained.

Processes are started once for each set of GPUs and train one layout after the other in the program's own ``main``;
layouts that need fewer GPUs than there are run side by side. ``tests/distributed/ranks.py`` keeps processes for another
purpose, with nothing in common but a loop over a pipe: those are forked on CPUs and keep one process group for tasks of
the tests, these are spawned, each sees its own GPUs alone, and every part is a whole run with groups of its own.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from qwen3next_train.config.schema import Config
from qwen3next_train.errors import ConfigError

_SIZES = {
    "EP": "parallel.expert_parallel_size",
    "CP": "parallel.context_parallel_size",
    "TP": "parallel.tensor_parallel_size",
    "Z": "parallel.zero_stage",
    "MB": "run.micro_batch_size",
}
_PART = re.compile("(EP|CP|TP|DP|MB|Z)([1-9][0-9]*)")
_LEAVING_S = 30.0
"""After one rank of a run has failed, the others get so long to say why."""


@dataclass(frozen=True)
class Part:
    """A layout that a curve, or a part of it, is trained at.

    Args:
        num_gpus: ranks.
        overrides: configuration keys and values.
    """

    num_gpus: int
    overrides: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, name: str, config: Config) -> Part:
        """Read a name.

        Args:
            name: without ``+``.
            config: global batch and the most rows of a micro-batch.

        Raises:
            ConfigError: it is none, or the global batch cannot be divided so.
        """
        found = [_PART.fullmatch(word) for word in name.split("x") if word != "1"]
        sizes = {match[1]: int(match[2]) for match in found if match}
        if None in found or len(sizes) < len(found):
            raise ConfigError(f"--layouts: {name!r} is no layout; join sizes by x: EP4, TP2xCP2xEP2, EP2xDP2xZ3, 1")
        slices = sizes.get("CP", 1) * sizes.get("TP", 1)
        num_gpus = max(slices, sizes.get("EP", 1)) * sizes.pop("DP", 1)
        rows, uneven = divmod(config.run.global_batch_size, num_gpus // slices)
        if uneven or not rows:
            batch = f"run.global_batch_size {config.run.global_batch_size}"
            raise ConfigError(f"--layouts: {name}: {batch} is not divisible by its {num_gpus // slices} ranks")
        sizes.setdefault("MB", max(size for size in range(1, rows + 1) if _fits(size, rows, config)))
        return cls(num_gpus, tuple((_SIZES[size], str(value)) for size, value in sizes.items()))


def _fits(size: int, rows: int, config: Config) -> bool:
    return rows % size == 0 and size <= config.run.micro_batch_size


@dataclass
class Training:
    """One curve.

    Args:
        name: of its run directory and in the picture.
        seed: of weights and data.
        parts: layouts, one after the other.
        directory: ``run.dir``.
        done: parts that have ended.
        wall_s: seconds of each of them.
        error: why it has no curve, or empty.
    """

    name: str
    seed: int
    parts: tuple[Part, ...]
    directory: Path
    done: int = 0
    wall_s: list[float] = field(default_factory=list)
    error: str = ""

    @property
    def is_pending(self) -> bool:
        """Whether there is something to do."""
        return not self.error and self.done < len(self.parts)

    def arguments(self, command: Sequence[str], steps: int) -> list[str]:
        """The command line of the next part."""
        part = self.parts[self.done]
        # The last step of a part is saved in any case.
        last = steps * (self.done + 1) // len(self.parts)
        settings = {"run.dir": self.directory, "run.seed": self.seed, "run.steps": last, **dict(part.overrides)}
        words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        accepted = ["--resume.accept", "run.steps,run.micro_batch_size"] if self.done else []
        return [*command, *words, *accepted]

    def end(self, codes: Sequence[int | None], wall_s: float, log: Path) -> None:
        """Take note of how the ranks of a part have ended, and what they printed."""
        self.wall_s.append(wall_s)
        if any(codes):
            self.error = f"part {self.done + 1} ended with {', '.join(map(str, codes))}: {_reason(self.directory, log)}"
        else:
            self.done += 1
        if not self.is_pending:
            shutil.rmtree(self.directory / "checkpoints", ignore_errors=True)


def _reason(directory: Path, log: Path) -> str:
    try:
        return str(json.loads((directory / "exit.json").read_text(encoding="utf-8"))["reason"])
    except (OSError, ValueError, KeyError):
        return (log.read_text(encoding="utf-8", errors="replace").splitlines() or ["nothing printed"])[-1]


class Ranks:
    """The processes of some GPUs, which train one part of a curve after the other.

    Args:
        first: number of their first GPU.
        num_gpus: processes.
        log: file that takes what they print.
    """

    def __init__(self, first: int, num_gpus: int, log: Path) -> None:
        self.gpus = range(first, first + num_gpus)
        self.training: Training | None = None
        self._log = log
        self._processes: list[BaseProcess] = []
        self.connections: list[Connection] = []
        self._codes: dict[Connection, int | None] = {}
        self._started_at = self._failed_at = 0.0

    def begin(self, training: Training, arguments: Sequence[str]) -> None:
        """Have the next part of a curve trained."""
        self.prepare()
        self.training, self._codes, self._started_at = training, {}, time.monotonic()
        port = _free_port()
        for connection in self.connections:
            connection.send((port, list(arguments)))

    def prepare(self) -> None:
        """Start the processes, where they do not live, without waiting until they can be used."""
        if self._processes:
            return
        # Not forked: each is to see its own GPUs alone, and CUDA asks once.
        context = multiprocessing.get_context("spawn")
        known = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        visible = ",".join(known[number] if known else str(number) for number in self.gpus)
        count = len(self.gpus)
        for rank in range(count):
            ours, theirs = context.Pipe()
            variables = {"CUDA_VISIBLE_DEVICES": visible, "RANK": rank, "LOCAL_RANK": rank}
            variables |= {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1"}
            texts = {name: str(value) for name, value in variables.items()}
            process = context.Process(target=_serve, args=(theirs, texts, str(self._log)))
            process.start()
            theirs.close()
            self._processes.append(process)
            self.connections.append(ours)

    def hear(self, connection: Connection) -> None:
        """Receive one rank's exit code."""
        try:
            self._codes[connection] = connection.recv()
        except (EOFError, OSError):
            self._codes[connection] = None
        if self._codes[connection] != 0 and not self._failed_at:
            self._failed_at = time.monotonic()

    @property
    def busy(self) -> list[Connection]:
        """Ranks whose exit code is still to come."""
        return [each for each in self.connections if each not in self._codes] if self.training else []

    def is_over(self) -> bool:
        """Whether the part has ended; its training then knows how, and these GPUs are free."""
        assert self.training is not None
        late = self._failed_at and time.monotonic() > self._failed_at + _LEAVING_S
        if self.busy and not late:
            return False
        codes = [self._codes.get(connection) for connection in self.connections]
        self.training.end(codes, time.monotonic() - self._started_at, self._log)
        # An engine leaves memory behind, as the process of a run that is resumed has not.
        if self._failed_at or self.training.is_pending:
            self.kill()
        self.training = None
        return True

    def kill(self) -> None:
        """End the processes; they would not heed a request after their first run."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for connection in self.connections:
            connection.close()
        self._processes, self.connections, self._failed_at = [], [], 0.0


def _serve(connection: Connection, variables: Mapping[str, str], log: str) -> None:
    """What a process of :class:`Ranks` does until the one that started it is gone."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ.update(variables)
    # Ctrl-C is for the process that started this one, which ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from qwen3next_train.cli.main import main as program

    while True:
        try:
            port, arguments = connection.recv()
        except (EOFError, OSError):
            os._exit(0)
        os.environ["MASTER_PORT"] = str(port)
        code = program(arguments)
        # An engine refers to itself.
        gc.collect()
        torch.cuda.empty_cache()
        connection.send(code)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def train_all(
    trainings: Sequence[Training], command: Sequence[str], *, steps: int, num_gpus: int, folder: Path
) -> Iterator[Training]:
    """Train every curve, as many at a time as there are GPUs for; each is yielded when it has ended.

    Args:
        trainings: what to train; their ``done`` and ``error`` are kept up to date.
        command: arguments of the program that all share.
        steps: of each curve.
        num_gpus: how many there are; no part needs more.
        folder: for what the processes print.
    """
    sizes: dict[int, int] = {}
    for part in (part for training in trainings for part in training.parts):
        sizes[part.num_gpus] = sizes.get(part.num_gpus, 0) + 1
    blocks = [
        # Single ones from the last on, so that they leave room for pairs.
        Ranks(num_gpus - 1 - number if size == 1 else number * size, size, folder / f"{size}_gpus_{number}.log")
        for size, needed in sorted(sizes.items())
        for number in range(min(num_gpus // size, needed))
    ]
    try:
        for block in blocks:
            block.prepare()
        active: list[Ranks] = []
        while active or any(training.is_pending for training in trainings):
            taken = {gpu for block in active for gpu in block.gpus}
            waiting = [
                each for each in trainings if each.is_pending and all(each is not one.training for one in active)
            ]
            for block in blocks:
                fitting = [each for each in waiting if each.parts[each.done].num_gpus == len(block.gpus)]
                if fitting and taken.isdisjoint(block.gpus):
                    waiting.remove(fitting[0])
                    block.begin(fitting[0], fitting[0].arguments(command, steps))
                    taken.update(block.gpus)
                    active.append(block)
            owners = {connection: block for block in active for connection in block.busy}
            for connection in wait(list(owners), timeout=_LEAVING_S):
                assert isinstance(connection, Connection)
                owners[connection].hear(connection)
            for block in list(active):
                training = block.training
                assert training is not None
                if block.is_over():
                    active.remove(block)
                    if not training.is_pending:
                        yield training
    finally:
        for block in blocks:
            block.kill()
