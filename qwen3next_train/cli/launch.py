"""``--nproc-per-node N``: this process becomes torchrun, which starts N of the same command."""

from __future__ import annotations

import json
import os
import signal
import site
import sys
from collections.abc import Callable
from pathlib import Path

from qwen3next_train.cli.arguments import without_option
from qwen3next_train.errors import ConfigError, ExitCode

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
"""Forwarded to the workers. torchrun's own list lacks SIGUSR1, which would then kill it and orphan the workers."""

SHUTDOWN_TIMEOUT_S = 1800
"""How long workers may take to save after a signal. torchrun's own 30 s would kill them in the middle of it."""


def run_processes(count: int, run_dir: Path, check_world: Callable[[], None]) -> int:
    """Run torchrun over ``count`` processes of the same command line, less the option.

    torchrun runs in this process, so signals reach it as they are, and workers get SIGTERM when it is killed.

    Args:
        count: number of processes.
        run_dir: ``run.dir``, where the workers say how the attempt ended.
        check_world: raises a ``ConfigError`` when the configuration does not fit ``count``.

    Returns:
        The exit code of the attempt, which torchrun itself would turn into 1.

    Raises:
        ConfigError: from ``check_world``; it also stands in ``exit.json``.
    """
    try:
        check_world()
    except ConfigError as error:
        from qwen3next_train.train.rundir import record_refusal

        record_refusal(run_dir, error)
        raise
    os.environ.update(launch_environment(dict(os.environ)))
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    earlier = _read(run_dir)
    try:
        torchrun(launch_arguments(count, sys.argv[1:]))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        # A negative one is the signal that killed the worker.
        otherwise = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        otherwise = 128 + error.sigval
    else:
        return ExitCode.FINISHED
    # An impatient second signal must not replace the exit code that is known now.
    for name in SIGNALS:
        signal.signal(signal.Signals[name], signal.SIG_IGN)
    return recorded_code(_read(run_dir), earlier, otherwise)


def recorded_code(record: bytes, earlier: bytes, otherwise: int) -> int:
    """The exit code in ``exit.json``.

    Args:
        record: the file's content now, empty when there is none.
        earlier: its content before the attempt, which says nothing about it.
        otherwise: the answer when the attempt has not recorded its end.
    """
    if record == earlier:
        return otherwise
    try:
        code = json.loads(record)["code"]
    except (ValueError, TypeError, KeyError):
        return otherwise
    # Torchrun has failed, so a run that says it is finished has not ended well.
    return code if type(code) is int and 0 < code < 256 else otherwise


def launch_arguments(count: int, argv: list[str]) -> list[str]:
    """What torchrun is told on this machine."""
    return [
        *("--standalone", "--nproc-per-node", str(count)),
        *("--signals-to-handle", ",".join(SIGNALS)),
        *("-m", "qwen3next_train"),
        *without_option(argv, "--nproc-per-node"),
    ]


def launch_environment(environment: dict[str, str]) -> dict[str, str]:
    """The environment for torchrun and its workers."""
    environment.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_TIMEOUT_S))
    root = str(Path(__file__).resolve().parents[2])
    if root not in site.getsitepackages():
        # A checkout that is not installed is importable here because of where the start script lies; the
        # workers are started by module name, from the working directory.
        paths = [root, *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    return environment


def _read(run_dir: Path) -> bytes:
    try:
        return (run_dir / "exit.json").read_bytes()
    except OSError:
        return b""
