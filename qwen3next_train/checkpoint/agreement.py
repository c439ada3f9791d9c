"""Stages that every rank runs and that succeed on all ranks or on none.

Without this, a rank whose disk is full would raise alone while its peers wait for it in the next collective.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, TypeVar, cast

from qwen3next_train.checkpoint.filesystem import describe_os_error
from qwen3next_train.errors import DivergedError, PeerLostError, StorageError, TrainError
from qwen3next_train.parallel.control import ControlGroup, Json

T = TypeVar("T")
FailureKind = Literal["internal", "diverged", "storage"]
_BY_URGENCY: tuple[FailureKind, ...] = ("internal", "diverged", "storage")


@dataclass(frozen=True)
class Failure:
    """Why a rank failed, in a form that travels.

    Args:
        rank: which rank.
        kind: what sort of error it ends in.
        text: the reason, one line.
        disk_full: no space or quota left.
    """

    rank: int
    kind: FailureKind
    text: str
    disk_full: bool


class StageFailed(Exception):
    """A stage failed on some rank; raised on every rank with the same failures.

    Args:
        failures: at least one, the most urgent first, then by rank.
        own: this rank's own exception, None when only others failed.
    """

    def __init__(self, failures: Sequence[Failure], own: Exception | None) -> None:
        super().__init__(failures[0].text)
        self.failures = failures
        self.own = own

    def to_error(self, where: str, *, space: str = "") -> Exception:
        """The exception that ends the operation on this rank.

        Args:
            where: what failed, the start of the line.
            space: bytes needed and available, added when a disk is full.
        """
        worst = self.failures[0]
        if worst.kind == "internal" and self.own is not None:
            return self.own
        others = len(self.failures) - 1
        text = f"{where}: rank {worst.rank}: {worst.text}"
        if others:
            text += f" (and {others} more {'rank' if others == 1 else 'ranks'})"
        if worst.disk_full:
            text += space
        error_type: type[TrainError] = {
            "internal": PeerLostError,
            "diverged": DivergedError,
            "storage": StorageError,
        }[worst.kind]
        return error_type(text)


def run_together(control: ControlGroup, action: Callable[[], tuple[T, Json]]) -> tuple[T, list[Json]]:
    """Run ``action`` on every rank; it succeeds everywhere or fails everywhere.

    Args:
        control: the ranks.
        action: returns what this rank keeps, and what it tells its peers.

    Returns:
        What this rank keeps, and what every rank told, in rank order.

    Raises:
        StageFailed: on every rank, when ``action`` raised on at least one.
    """
    error, kept, told = _attempt(action)
    failure = None if error is None else asdict(_describe(control.rank, error))
    replies = control.gather_json({"failure": failure, "told": told})
    failures = [Failure(**reply["failure"]) for reply in replies if reply["failure"]]
    if failures:
        failures.sort(key=lambda failure: (_BY_URGENCY.index(failure.kind), failure.rank))
        raise StageFailed(failures, error)
    return cast(T, kept), [reply["told"] for reply in replies]


def _attempt(action: Callable[[], tuple[T, Json]]) -> tuple[Exception | None, T | None, Json]:
    try:
        return None, *action()
    except Exception as error:  # noqa: BLE001 - peers must hear of any failure; StageFailed carries it on
        return error, None, None


def _describe(rank: int, error: Exception) -> Failure:
    if isinstance(error, DivergedError):
        return Failure(rank, "diverged", str(error), False)
    if isinstance(error, OSError):
        return Failure(rank, "storage", describe_os_error(error), error.errno in (errno.ENOSPC, errno.EDQUOT))
    if isinstance(error, StorageError):
        return Failure(rank, "storage", str(error), False)
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return Failure(rank, "internal", text, False)
