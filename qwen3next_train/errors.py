"""The program's own exceptions and the exit codes they end a run with.

Every foreseen failure is one of these: the command line prints its text as one line and exits with
``exit_code``; any other exception is a bug (:data:`ExitCode.INTERNAL`) and keeps its traceback.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Process exit codes; torchrun flattens them to 1, so they also stand in ``RUN/exit.json``."""

    FINISHED = 0
    USAGE = 2
    DATA = 65
    PEER_LOST = 69
    INTERNAL = 70
    NO_MEMORY = 71
    STORAGE = 74
    STOPPED = 75
    DIVERGED = 76


class TrainError(Exception):
    """A foreseen failure whose text is one line: what is wrong, the value, what to do."""

    exit_code: ExitCode = ExitCode.INTERNAL


class ConfigError(TrainError):
    """A wrong command line, configuration value or combination of values."""

    exit_code = ExitCode.USAGE


class KernelUnavailable(ConfigError):
    """A kernel backend asked for by name cannot run here."""


class DataError(TrainError):
    """Training data is missing, unreadable, empty or damaged."""

    exit_code = ExitCode.DATA


class CheckpointError(TrainError):
    """Checkpoints exist but none can be loaded."""

    exit_code = ExitCode.DATA


class PeerLostError(TrainError):
    """Another rank died or stopped answering."""

    exit_code = ExitCode.PEER_LOST


class OutOfMemory(TrainError):
    """The memory of the host or of a GPU does not suffice."""

    exit_code = ExitCode.NO_MEMORY


class StorageError(TrainError):
    """Reading or writing the run directory failed (permission, disk full)."""

    exit_code = ExitCode.STORAGE


class StoppedBySignal(TrainError):
    """The run was asked to stop and has saved; the same command continues it."""

    exit_code = ExitCode.STOPPED


class DivergedError(TrainError):
    """Losses or gradients stayed non-finite."""

    exit_code = ExitCode.DIVERGED
