"""One training attempt, from configuration to exit code."""

from __future__ import annotations

import logging
import os
import re
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qwen3next_train.config.schema import Config
from qwen3next_train.errors import ExitCode, PeerLostError, TrainError
from qwen3next_train.imports import imported_to_stay
from qwen3next_train.launcher import LaunchedProcess
from qwen3next_train.log import get_logger
from qwen3next_train.metrics.console import open_run_log
from qwen3next_train.metrics.redaction import Redactor
from qwen3next_train.metrics.tensorboard_sink import require_library
from qwen3next_train.metrics.wandb_settings import check_settings
from qwen3next_train.train.failures import foreseen
from qwen3next_train.train.flight_recorder import recorded_collectives, write_collectives
from qwen3next_train.train.held_signals import release_stop_signals
from qwen3next_train.train.resume import NEWEST, Resume
from qwen3next_train.train.run_directory import RunDirectory
from qwen3next_train.train.signals import StopRequest, die_with_parent, stop_reason

# Nothing up here imports torch, whose import takes seconds in which a signal could not be recorded as a stop.
if TYPE_CHECKING:
    from qwen3next_train.parallel.rank_check import RankInfo
    from qwen3next_train.train.loop import Run

# Of gloo and torch's store. Which one comes depends on whether the collective was waited for at once or later.
_LOST_PEER_SIGNS = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed", "Read error"),
    *("Timed out waiting", "Application timeout caused pair closure", "Socket Timeout"),
)
_SOURCE_PLACE = re.compile(r"\[?/\S+\.(?:cc|cpp|h):\d+\]?:? *")
_DEVELOPERS_ADVICE = re.compile(
    r"\.? (?:This is typically caused by a remote worker.*?GLHF![^;]*|Exception raised from .*)"
)


@dataclass
class _Attempt:
    """One attempt; how far it came is known also when it fails."""

    config: Config
    run_dir: RunDirectory
    stop: StopRequest
    resume: Resume
    run: Run | None = None
    rank_infos: Sequence[RankInfo] = ()

    @property
    def step(self) -> int | None:
        """Last finished step; None while no state is restored."""
        return None if self.run is None else self.run.state.step

    def train(self, stack: ExitStack) -> tuple[ExitCode, str]:
        """Build and train; return how it ended."""
        with imported_to_stay():
            from qwen3next_train.parallel.process_groups import process_context
            from qwen3next_train.train.build import build_run
            from qwen3next_train.train.loop import train
            from qwen3next_train.train.profiling import snapshot_when_out_of_memory
            from qwen3next_train.train.run_fingerprint import run_fingerprint
            from qwen3next_train.train.validation import end_for_want_of_progress

        settings = self.config.run
        run_path, rank = self.run_dir.path, self.run_dir.rank
        stack.enter_context(recorded_collectives(run_path, rank))
        joined = process_context(
            settings.device,
            fingerprint=run_fingerprint(self.config, self.resume),
            peer_timeout_s=settings.peer_timeout_s,
        )
        context = stack.enter_context(joined)
        self.rank_infos = context.rank_infos
        self.run_dir.name_attempt(context.control)
        with snapshot_when_out_of_memory(self.config, context, run_path):
            self.run = build_run(self.config, context, self.run_dir, self.stop, stack, self.resume)
            first_step = self.run.state.step
            stopped_by = train(self.run)
        if stopped_by is None:
            early = end_for_want_of_progress(self.run.state, self.config)
            return ExitCode.FINISHED, early or f"finished at step {settings.steps}"
        return ExitCode.STOPPED, stop_reason(stopped_by, None if self.step == first_step else self.step)


def run_training(config: Config, check_world: Callable[[], None], resume: Resume = NEWEST) -> int:
    """Train in ``run.dir``, going on from its newest complete checkpoint or the one that ``resume`` names.

    The process is expected to exit with the returned code: SIGTERM and the like stay ignored from then on.

    Args:
        config: the resolved configuration.
        check_world: raises a ``ConfigError`` when the configuration does not fit the number of processes.
        resume: which checkpoint to go on from, and what may differ from it.

    Returns:
        The exit code; it and its one-line reason also stand in ``RUN/exit.json``.
    """
    process = LaunchedProcess.from_environment(os.environ)
    rank = process.rank
    run_dir = RunDirectory(Path(config.run.dir), rank=rank)
    die_with_parent()

    def record_early_stop(signal_name: str) -> None:
        # torchrun sends SIGTERM also when another rank has failed. That rank has usually recorded its reason, and
        # the first record stays; one that was killed has not, and this rank cannot tell it from a request to stop.
        run_dir.finish(ExitCode.STOPPED, stop_reason(signal_name, None))

    with StopRequest(record_early_stop) as stop, ExitStack() as opened:
        attempt = _Attempt(config, run_dir, stop, resume)
        try:
            run_dir.open()
            opened.callback(run_dir.close)
            # What came since the process was started is recorded as a stop from here on.
            release_stop_signals()
            if rank == 0:
                opened.callback(open_run_log(run_dir.log_path, Redactor(os.environ)).close)
            process.check_host()
            # All ranks would be rejected alike. When another one were first, torchrun would end rank 0, which
            # holds the directory, before it has said why.
            if rank == 0 or "TORCHELASTIC_RUN_ID" not in os.environ:
                check_world()
                check_settings(config.logging.wandb, os.environ, writes=rank == 0)
                require_library(config.logging.tensorboard)
            # What the attempt opens is closed before its end is reported, while log and lock are still there.
            with ExitStack() as stack:
                code, reason = attempt.train(stack)
        except TrainError as error:
            code, reason = error.exit_code, str(error)
        except Exception as error:  # noqa: BLE001 - the boundary: every failure must reach exit.json
            code, reason = _classify(error, rank, attempt)
        stop.conclude()
        if code == ExitCode.PEER_LOST:
            reason = _for_users(reason)
        # What all ranks fail of alike is said once.
        if run_dir.finish(code, reason, step=attempt.step):
            done = code in (ExitCode.FINISHED, ExitCode.STOPPED)
            get_logger().log(logging.INFO if done else logging.ERROR, "%s", reason)
    return int(code)


def _classify(error: Exception, rank: int, attempt: _Attempt) -> tuple[ExitCode, str]:
    """Exit code and reason of an exception that is not ours; one that only a bug explains is printed."""
    text = " ".join(str(error).split())
    # Before the lost rank: NCCL's error may be that memory is used up, gloo's that files are.
    if (known := foreseen(error, attempt.config)) is not None:
        return known.exit_code, str(known)
    if _is_lost_peer(error):
        from qwen3next_train.parallel.rank_check import describe_lost

        # Where the others live is known once all have found each other.
        lost = (attempt.rank_infos and describe_lost(attempt.rank_infos, rank)) or "lost another rank"
        collectives = write_collectives(attempt.run_dir.path, rank)
        seen = f"; its last collectives: {collectives}" if collectives is not None else ""
        return PeerLostError.exit_code, f"rank {rank}: {lost}: {_for_users(text)}{seen}"
    traceback.print_exception(error)
    return ExitCode.INTERNAL, f"{type(error).__name__}: {text}"


def _for_users(text: str) -> str:
    """The text of a communication library without places in its source and advice to its developers."""
    return _DEVELOPERS_ADVICE.sub("", _SOURCE_PLACE.sub("", " ".join(text.split())))


def _is_lost_peer(error: Exception) -> bool:
    """Whether a collective failed because another rank is gone; gloo says so only in the text."""
    if not isinstance(error, RuntimeError):
        # All of torch's are; what failed may be torch's import.
        return False
    import torch.distributed as dist

    # The store's too: what a rank waits for there, another one has to bring.
    if isinstance(error, dist.DistError):
        return True
    return any(sign in str(error) for sign in _LOST_PEER_SIGNS)
