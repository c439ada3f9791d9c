"""One training attempt, from configuration to exit code."""

from __future__ import annotations

import logging
import os
import traceback
from contextlib import ExitStack
from pathlib import Path

from qwen3next_train.config.schema import Config
from qwen3next_train.errors import ExitCode, PeerLostError, TrainError
from qwen3next_train.log import get_logger
from qwen3next_train.metrics.console import open_run_log
from qwen3next_train.metrics.redaction import Redactor
from qwen3next_train.train.rundir import RunDirectory
from qwen3next_train.train.signals import StopRequest, die_with_parent


def run_training(config: Config) -> int:
    """Train in ``run.dir``, going on from its newest complete checkpoint.

    Returns:
        The exit code; it and its one-line reason also stand in ``RUN/exit.json``.
    """
    rank = int(os.environ.get("RANK", "0"))
    run_dir = RunDirectory(Path(config.run.dir), rank=rank)
    die_with_parent()
    with StopRequest() as stop, ExitStack() as opened:
        try:
            run_dir.open()
            opened.callback(run_dir.close)
            if rank == 0:
                opened.callback(open_run_log(run_dir.log_path, Redactor(os.environ)).close)
            # What the attempt opens is closed before its end is reported, while log and lock are still there.
            with ExitStack() as stack:
                stopped_by = _attempt(config, run_dir, stop, stack)
        except TrainError as error:
            code, reason = error.exit_code, str(error)
        except Exception as error:  # noqa: BLE001 - the boundary: every failure must reach exit.json
            code, reason = _classify(error, rank)
        else:
            code, reason = ExitCode.FINISHED, f"finished at step {config.run.steps}"
            if stopped_by is not None:
                code, reason = ExitCode.STOPPED, f"stopped on {stopped_by}; run the same line to go on"
        # What all ranks fail of alike is said once.
        if run_dir.finish(code, reason):
            done = code in (ExitCode.FINISHED, ExitCode.STOPPED)
            get_logger().log(logging.INFO if done else logging.ERROR, "%s", reason)
    return int(code)


def _attempt(config: Config, run_dir: RunDirectory, stop: StopRequest, stack: ExitStack) -> str | None:
    """Build and train; return the signal that stopped the run, if one did."""
    from qwen3next_train.parallel.process_groups import process_context
    from qwen3next_train.train.build import build_run
    from qwen3next_train.train.loop import train

    context = stack.enter_context(process_context(config.run.device))
    return train(build_run(config, context, run_dir, stop, stack))


def _classify(error: Exception, rank: int) -> tuple[ExitCode, str]:
    """Exit code and reason of an exception that is not ours; prints it."""
    text = " ".join(str(error).split())
    if _is_lost_peer(error):
        return PeerLostError.exit_code, f"rank {rank}: lost another rank: {text}"
    traceback.print_exception(error)
    if isinstance(error, OSError):
        return ExitCode.STORAGE, text
    return ExitCode.INTERNAL, f"{type(error).__name__}: {text}"


def _is_lost_peer(error: Exception) -> bool:
    """Whether a collective failed because another rank is gone; gloo says so only in the text."""
    import torch.distributed as dist

    if isinstance(error, dist.DistBackendError | dist.DistNetworkError):
        return True
    signs = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Socket Timeout")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
