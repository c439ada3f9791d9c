"""``--nproc-per-node N``: this process becomes torchrun, which starts N of the same command."""

from __future__ import annotations

import json
import logging
import os
import signal
import site
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qwen3next_train.checkpoint.filesystem import LOCAL_FILESYSTEM, UnusableFileError, read_file
from qwen3next_train.cli.arguments import without_option
from qwen3next_train.cli.forwarding import SignalForwarding
from qwen3next_train.cli.processes import LAUNCH_OPTIONS, Processes
from qwen3next_train.errors import ConfigError, ExitCode, OutOfMemory, PeerLostError, StoppedBySignal, TrainError
from qwen3next_train.imports import imported_to_stay
from qwen3next_train.launcher import check_host
from qwen3next_train.log import get_logger
from qwen3next_train.train.failures import foreseen
from qwen3next_train.train.flight_recorder import written_dumps
from qwen3next_train.train.memory_check import num_oom_kills, settings_that_help
from qwen3next_train.train.run_files import MAX_EXIT_BYTES
from qwen3next_train.train.signals import stop_reason

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def run_processes(processes: Processes, run_dir: Path, check_world: Callable[[], None]) -> int:
    """Run torchrun over processes of the same command line, less the options that start them.

    torchrun runs in this process, so it is this process that schedulers and people signal, and workers get SIGTERM
    when it is killed.

    Args:
        processes: how many, on which nodes.
        run_dir: ``run.dir``, where the workers say how the attempt ended.
        check_world: raises a ``ConfigError`` when the configuration does not fit the number of processes.

    Returns:
        The exit code of the attempt, which torchrun itself would turn into 1.

    Raises:
        ConfigError: from ``check_world``, or the endpoint does not resolve; it also stands in ``exit.json``.
    """
    try:
        check_world()
        check_host(processes.host, "--rdzv-endpoint")
    except ConfigError as error:
        _record(run_dir, error)
        raise
    os.environ.update(launch_environment(dict(os.environ)))
    earlier = _read(run_dir)
    with SignalForwarding(lambda name: _conclude(run_dir, earlier, _stopped_by(name))) as forwarding:
        failure = _try_torchrun(launch_arguments(processes, sys.argv[1:]), num_oom_kills())
    if failure is None:
        return ExitCode.FINISHED
    if forwarding.requested is not None:
        failure = _stopped_by(forwarding.requested)
    return _conclude(run_dir, earlier, failure)


@dataclass(frozen=True)
class _WorkerFailed:
    """A worker has ended with a code of its own, which it has explained.

    Args:
        exit_code: that code.
    """

    exit_code: int


def _conclude(run_dir: Path, earlier: bytes, failure: TrainError | _WorkerFailed) -> int:
    """The exit code of an attempt that has not finished: as a worker or another node recorded it, or ``failure``'s.

    What nobody else can say is printed and recorded here.
    """
    recorded = recorded_code(_read(run_dir), earlier)
    if recorded == ExitCode.STOPPED and failure.exit_code != recorded:
        # Workers cannot tell a request to stop from the SIGTERM torchrun sends them when one of them is gone.
        recorded = None
        if failure.exit_code == ExitCode.PEER_LOST and isinstance(failure, _WorkerFailed):
            failure = PeerLostError("another process was lost; run the same line to go on from the newest checkpoint")
    if recorded is not None:
        return recorded
    if isinstance(failure, PeerLostError):
        failure = PeerLostError(f"{failure}{written_dumps(run_dir)}")
    if isinstance(failure, TrainError):
        get_logger().error("%s", failure)
        _record(run_dir, failure)
    return failure.exit_code


def _stopped_by(signal_name: str) -> StoppedBySignal:
    return StoppedBySignal(stop_reason(signal_name, None))


def _try_torchrun(arguments: list[str], earlier_oom_kills: int | None) -> TrainError | _WorkerFailed | None:
    """The same as :func:`_torchrun`, which may fail itself: no temporary folder for its logs, no memory."""
    try:
        return _torchrun(arguments, earlier_oom_kills)
    except Exception as error:
        if (known := foreseen(error)) is None:
            raise
        return known


def _torchrun(arguments: list[str], earlier_oom_kills: int | None) -> TrainError | _WorkerFailed | None:
    """Run torchrun to its end; return what went wrong."""
    with imported_to_stay():
        from torch.distributed import DistError
        from torch.distributed.elastic.multiprocessing import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.run import main

    # It says "failed" of a run that was asked to stop, too. The workers or this process say what there is to say.
    for module in ("multiprocessing.api", "agent.server.api"):
        logging.getLogger(f"torch.distributed.elastic.{module}").addFilter(_is_not_routine)
    try:
        main(arguments)
    except ChildFailedError as error:
        return _first_failure(error, memory_ran_out=num_oom_kills() != earlier_oom_kills)
    except SignalException as error:
        return _stopped_by(error.sigval.name)
    except DistError as error:
        return PeerLostError(
            f"--rdzv-endpoint: the nodes did not find each other ({' '.join(str(error).split())}); "
            "check host and port and that every node started"
        )
    return None


def _is_not_routine(record: logging.LogRecord) -> bool:
    # All workers are done at the exit barrier; the node that keeps the store leaves as soon as all have come there.
    if str(record.msg).startswith("Error waiting on exit barrier") and record.exc_info:
        from torch.distributed import DistNetworkError

        return not isinstance(record.exc_info[1], DistNetworkError)
    return not str(record.msg).startswith(("failed (exitcode", "Sending process"))


def _first_failure(error: ChildFailedError, *, memory_ran_out: bool) -> TrainError | _WorkerFailed:
    """What the others' ends follow from.

    Args:
        error: how the workers ended.
        memory_ran_out: the kernel has killed some process here, for want of memory, since they were started.
    """
    # Times are whole seconds; a worker that a signal killed (negative) is the cause of what others ended with, except
    # by SIGTERM: torchrun sends it to the others once one has failed, maybe before they handle it.
    rank, failure = min(
        error.failures.items(),
        key=lambda item: (item[1].timestamp, item[1].exitcode == -signal.SIGTERM, item[1].exitcode),
    )
    if failure.exitcode > 0:
        return _WorkerFailed(failure.exitcode)
    number = -failure.exitcode
    if number == signal.SIGABRT:
        return PeerLostError(
            f"rank {rank} (process {failure.pid}) was killed by SIGABRT, as NCCL does when another rank has not "
            "answered for run.peer_timeout_s (the log says); run the same line to go on from the newest checkpoint"
        )
    if number == signal.SIGKILL and memory_ran_out:
        return OutOfMemory(
            f"rank {rank} (process {failure.pid}) was killed by the kernel: out of memory on the host; "
            f"{settings_that_help(None, on_device=False)}"
        )
    cause = ", as the kernel does when memory runs out" if number == signal.SIGKILL else ""
    return PeerLostError(
        f"rank {rank} (process {failure.pid}) was killed by {signal.Signals(number).name}{cause}; "
        "run the same line to go on from the newest checkpoint"
    )


def recorded_code(record: bytes, earlier: bytes) -> int | None:
    """The exit code in ``exit.json``; None when the attempt has not recorded its end.

    Args:
        record: the file's content now, empty when there is none.
        earlier: its content before the attempt, which says nothing about it.
    """
    if record == earlier:
        return None
    try:
        code = json.loads(record)["code"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    # torchrun has failed, so a run that says it is finished has not ended well.
    return code if type(code) is int and 0 < code < 256 else None


def launch_arguments(processes: Processes, argv: list[str]) -> list[str]:
    """What torchrun is told on this machine."""
    if processes.num_nodes == 1:
        meeting = ["--standalone"]
    else:
        # Static: ranks follow the order of the nodes, so rank 0 and its log are on the first one, attempt by attempt.
        meeting = ["--nnodes", str(processes.num_nodes), "--node-rank", str(processes.node_rank)]
        meeting += ["--rdzv-backend", "static", "--rdzv-endpoint", processes.endpoint]
    for option in LAUNCH_OPTIONS:
        argv = without_option(argv, option.name)
    return [
        *meeting,
        *("--nproc-per-node", str(processes.per_node)),
        # The other signals are forwarded by this process; torchrun wants at least one.
        *("--signals-to-handle", "SIGQUIT"),
        *("-m", "qwen3next_train"),
        *argv,
    ]


def launch_environment(environment: dict[str, str]) -> dict[str, str]:
    """The environment for torchrun and its workers."""
    root = str(Path(__file__).resolve().parents[2])
    if root not in site.getsitepackages():
        # A checkout that is not installed is importable here because of where the start script lies; the
        # workers are started by module name, from the working directory.
        paths = [root, *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    return environment


def _record(run_dir: Path, error: TrainError) -> None:
    from qwen3next_train.train.run_directory import record_end

    record_end(run_dir, error)


def _read(run_dir: Path) -> bytes:
    try:
        return read_file(LOCAL_FILESYSTEM, run_dir / "exit.json", max_bytes=MAX_EXIT_BYTES)
    except (OSError, UnusableFileError):
        return b""
