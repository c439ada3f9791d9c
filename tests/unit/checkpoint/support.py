"""A tiny training state, ranks as threads, and filesystems that record, cut and fail."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import xxhash

from qwen3next_train.checkpoint.filesystem import Filesystem, LocalFilesystem
from qwen3next_train.checkpoint.fragments import FragmentReader
from qwen3next_train.checkpoint.manager import CheckpointManager, SaveReport, VerifiedCheckpoint
from qwen3next_train.checkpoint.manifest import Header, WorldLayout
from qwen3next_train.checkpoint.train_state import TrainState
from qwen3next_train.engine.base import FRAGMENT_KINDS, Fragment
from qwen3next_train.held_elements import Runs
from qwen3next_train.log import get_logger
from qwen3next_train.parallel.control import ControlGroup, SingleProcess
from qwen3next_train.parameters import Init, ParamSpec

T = TypeVar("T")

PARAMETERS = (
    ParamSpec("embed.weight", (7, 5), "embedding", Init("normal", 1.0)),
    ParamSpec("layers.0.experts", (4, 3, 2), "experts", Init("normal", 1.0), expert=True),
    ParamSpec("norm.weight", (5,), "norm", Init("constant", 0.0)),
)


def logical_state(step: int) -> dict[str, dict[str, torch.Tensor]]:
    """fp32 ``[numel]`` of every parameter and kind; different for every step."""
    generator = torch.Generator().manual_seed(step)
    return {
        spec.name: {kind: torch.randn(spec.numel, generator=generator) for kind in FRAGMENT_KINDS}
        for spec in PARAMETERS
    }


def fragments_of(step: int, rank: int = 0, world_size: int = 1) -> list[Fragment]:
    """Rank's share when all parameters, laid end to end, are cut into ``world_size`` equal parts (as ZeRO does)."""
    state = logical_state(step)
    total = sum(spec.numel for spec in PARAMETERS)
    first, last = total * rank // world_size, total * (rank + 1) // world_size
    fragments, offset = [], 0
    for spec in PARAMETERS:
        start, stop = max(first - offset, 0), min(last - offset, spec.numel)
        if start < stop:
            tensors = {kind: state[spec.name][kind][start:stop] for kind in FRAGMENT_KINDS}
            fragments.append(Fragment(spec.name, Runs(start, stop - start), tensors))
        offset += spec.numel
    return fragments


def train_state(step: int, *, consecutive_skips: int = 0) -> TrainState:
    return TrainState(
        step=step,
        consumed_samples=8 * step,
        consumed_tokens=1024 * step,
        flops_total=10**24 * step,
        skipped_steps=1,
        optimizer_step=max(step - 1, 0),
        data_fingerprint="abc123",
        wandb_id="w1",
        consecutive_skips=consecutive_skips,
    )


def header(world_size: int = 1) -> Header:
    layout = WorldLayout(world_size=world_size, expert_parallel_size=1, zero_stage=1)
    return Header(PARAMETERS, {"optimizer": {"lr": 3e-4}}, layout, {"torch": "2.13.0"})


def manager(
    directory: Path, *, control: ControlGroup | None = None, keep: int = 2, filesystem: Filesystem | None = None
) -> CheckpointManager:
    return CheckpointManager(
        directory,
        control=control or SingleProcess(),
        keep=keep,
        filesystem=filesystem or HookedFilesystem(),
        visibility_timeout_s=0.2,
    )


def save(
    checkpoints: CheckpointManager,
    step: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    of: int = 0,
    consecutive_skips: int = 0,
) -> SaveReport:
    """Save the state of step ``of`` (by default ``step`` itself) as the checkpoint of ``step``."""
    return checkpoints.save(
        step=step,
        fragments=fragments_of(of or step, rank, world_size),
        train_state=train_state(step, consecutive_skips=consecutive_skips),
        rank_tensors={"rng": torch.tensor([step, rank])},
        header=header(world_size),
    )


def assert_holds(found: VerifiedCheckpoint | None, step: int, *, of: int = 0) -> None:
    """The checkpoint is of ``step`` and reads back the state of step ``of``, every element."""
    assert found is not None
    assert found.step == step
    assert found.manifest.train_state == train_state(step)
    reader = FragmentReader(found.path, found.manifest)
    reader.check_parameters(PARAMETERS)
    for name, kinds in logical_state(of or step).items():
        for kind in FRAGMENT_KINDS:
            torch.testing.assert_close(reader.read(name, kind, 0, kinds[kind].numel()), kinds[kind], rtol=0, atol=0)


class Killed(BaseException):
    """The process is gone: no handler for ``Exception`` sees it."""


class HookedFilesystem:
    """The real files, without the wait for the device, with a hook before every operation.

    Args:
        before: called with the operation's name and arguments; may raise.
    """

    def __init__(self, before: Callable[[str, tuple[Any, ...]], None] = lambda name, arguments: None) -> None:
        self._local = LocalFilesystem()
        self._before = before
        # A large share is written by several threads.
        self._lock = threading.Lock()
        self._paths: dict[int, Path] = {}
        self._open: set[int] = set()
        self.log: list[tuple[str, str]] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def operation(*arguments: Any) -> Any:
            where = arguments[0]
            path = self._paths.get(where, Path("?")) if isinstance(where, int) else where
            with self._lock:
                self.log.append((name, path.name))
                self._before(name, arguments)
            if name in ("fsync", "fsync_dir"):
                return None
            result = getattr(self._local, name)(*arguments)
            if name in ("create", "open"):
                self._paths[result] = path
                self._open.add(result)
            elif name == "close":
                self._open.discard(arguments[0])
            return result

        return operation

    def path_of(self, descriptor: int) -> Path:
        return self._paths[descriptor]

    def close_all(self) -> None:
        """Close what a killed or failed operation left open, as the end of a process does."""
        for descriptor in self._open:
            os.close(descriptor)
        self._open.clear()


class CutFilesystem(HookedFilesystem):
    """Dies at operation number ``cut``; a write that dies leaves half of its bytes.

    Remembers what had not been synced, so that :meth:`lose_power` can take it away.
    """

    def __init__(self, cut: int) -> None:
        super().__init__(self._count)
        self._cut = cut
        self._num_operations = 0
        self._unsynced_files: set[Path] = set()
        self.unsynced_names: list[tuple[str, Path, Path]] = []

    def _count(self, name: str, arguments: tuple[Any, ...]) -> None:
        if self._num_operations == self._cut:
            if name == "write":
                data = memoryview(arguments[1])
                os.write(arguments[0], data[: len(data) // 2])
            raise Killed
        self._num_operations += 1
        self._remember(name, arguments)

    def _remember(self, name: str, arguments: tuple[Any, ...]) -> None:
        match name:
            case "create":
                self._unsynced_files.add(arguments[0])
            case "fsync":
                self._unsynced_files.discard(self.path_of(arguments[0]))
            case "rename":
                source, target = arguments
                self.unsynced_names.append(("rename", source, target))
                self._unsynced_files = {
                    target / path.relative_to(source) if path.is_relative_to(source) else path
                    for path in self._unsynced_files
                }
            case "make_dir":
                self.unsynced_names.append(("make_dir", arguments[0], arguments[0]))
            case "fsync_dir":
                self.unsynced_names = [entry for entry in self.unsynced_names if entry[2].parent != arguments[0]]

    def lose_power(self, num_names_kept: int) -> None:
        """Empty files whose content was not synced; undo all but the first unsynced directory changes."""
        for path in self._unsynced_files:
            if path.exists():
                path.write_bytes(b"")
        for operation, source, target in reversed(self.unsynced_names[num_names_kept:]):
            if operation == "make_dir":
                shutil.rmtree(target, ignore_errors=True)
            elif target.is_dir():
                target.rename(source)


class FailingFilesystem(HookedFilesystem):
    """Fails operation number ``fail_at`` once, or every one that ``matches`` and comes after it, with ``code``."""

    def __init__(self, fail_at: int, code: int, *, once: bool = True, only: Sequence[str] = ()) -> None:
        super().__init__(self._count)
        self._fail_at = fail_at
        self._code = code
        self._once = once
        self._only = only
        self._num_operations = -1
        self.failed_operation = ""

    def _count(self, name: str, arguments: tuple[Any, ...]) -> None:
        self._num_operations += 1
        due = self._num_operations == self._fail_at if self._once else self._num_operations >= self._fail_at
        if due and (not self._only or name in self._only):
            self.failed_operation = name
            # Like the system's: calls on descriptors know no name.
            name_known = () if isinstance(arguments[0], int) else (str(arguments[0]),)
            raise OSError(self._code, os.strerror(self._code), *name_known)


def failing(operation: str, file: str, code: int, *, step: int = 2) -> HookedFilesystem:
    """Fails one operation on one file of one checkpoint."""

    def before(name: str, arguments: tuple[Any, ...]) -> None:
        where = arguments[0]
        path = filesystem.path_of(where) if isinstance(where, int) else where
        if name == operation and path.name == file and path.parent.name in (f"step_{step:08d}", "checkpoints"):
            raise OSError(code, os.strerror(code), *(() if isinstance(where, int) else (str(path),)))

    filesystem = HookedFilesystem(before)
    return filesystem


def count_operations(action: Callable[[HookedFilesystem], object]) -> int:
    """Number of file operations ``action`` makes when nothing goes wrong."""
    filesystem = HookedFilesystem()
    action(filesystem)
    return len(filesystem.log)


class ThreadControl:
    """Control group of ranks that are threads of this process."""

    def __init__(self, rank: int, shared: _Shared) -> None:
        self.rank = rank
        self.world_size = len(shared.slots)
        self._shared = shared

    def all_true(self, flag: bool) -> bool:
        return all(self.gather_json(flag))

    def any_true(self, flag: bool) -> bool:
        return any(self.gather_json(flag))

    def broadcast_json(self, value: Any) -> Any:
        return self.gather_json(value)[0]

    def sum_ints(self, values: Sequence[int]) -> list[int]:
        return [sum(column) for column in zip(*self.gather_json(list(values)), strict=True)]

    def gather_json(self, value: Any) -> list[Any]:
        self._shared.slots[self.rank] = json.dumps(value)
        self._shared.barrier.wait(timeout=20)
        result = [json.loads(slot) for slot in self._shared.slots]
        self._shared.barrier.wait(timeout=20)
        return result


class _Shared:
    def __init__(self, world_size: int) -> None:
        self.slots = ["null"] * world_size
        self.barrier = threading.Barrier(world_size)


def on_ranks(world_size: int, action: Callable[[ThreadControl], T]) -> list[T | Exception]:
    """Run ``action`` on every rank at once; its results, or the exceptions it raised, by rank."""
    return on_two_threads_of_ranks(world_size, lambda control, saving: action(control))


def on_two_threads_of_ranks(
    world_size: int, action: Callable[[ThreadControl, ThreadControl], T]
) -> list[T | Exception]:
    """:func:`on_ranks` with a second group, for a thread of the rank's own."""
    groups = [_Shared(world_size) for _ in range(2)]

    def attempt(rank: int) -> T | Exception:
        try:
            return action(*(ThreadControl(rank, shared) for shared in groups))
        except Exception as error:
            return error

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(attempt, range(world_size)))


@contextmanager
def collected_log(level: int = logging.WARNING) -> Iterator[list[str]]:
    """What the package logs meanwhile, of this level and above."""
    collector = _Collector(level)
    get_logger().addHandler(collector)
    try:
        yield collector.lines
    finally:
        get_logger().removeHandler(collector)


class _Collector(logging.Handler):
    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def names(directory: Path) -> set[str]:
    """What lies in a checkpoints directory, the hint for people aside."""
    return {path.name for path in directory.iterdir()} - {"latest"}


def rewrite_manifest(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change fields of a manifest and give it a right self-hash, as somebody who can write there could."""
    fields = cast(dict[str, Any], json.loads(path.read_text()))
    change(fields)
    fields.pop("self_xxh3_128")
    write_with_self_hash(path, json.dumps(fields)[:-1].encode())


def write_with_self_hash(path: Path, start: bytes) -> None:
    """A manifest file of these bytes and a right self-hash."""
    prefix = start + b',\n"self_xxh3_128": "'
    path.write_bytes(prefix + xxhash.xxh3_128_hexdigest(prefix).encode() + b'"\n}\n')
