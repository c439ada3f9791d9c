"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypedDict

import torch

from qwen3next_train.accounting.flops import training_flops
from qwen3next_train.batch import PackedBatch
from qwen3next_train.checkpoint.agreement import StageFailed, run_together
from qwen3next_train.checkpoint.background import BackgroundSaver
from qwen3next_train.checkpoint.manager import CheckpointManager, SaveReport
from qwen3next_train.checkpoint.manifest import Header
from qwen3next_train.checkpoint.train_state import TrainState, rng_state
from qwen3next_train.config.batch_size import batch_size
from qwen3next_train.config.schema import Config
from qwen3next_train.engine.base import Engine, Fragment, Report, StepResult, StepTotals
from qwen3next_train.errors import DivergedError, StorageError
from qwen3next_train.log import get_logger
from qwen3next_train.metrics.sinks import Sink
from qwen3next_train.metrics.throughput import Throughput
from qwen3next_train.optim.schedule import learning_rate
from qwen3next_train.parallel.control import ControlGroup
from qwen3next_train.train.profiling import StepProfiler
from qwen3next_train.train.samples import TrainingSamples
from qwen3next_train.train.signals import StopRequest
from qwen3next_train.train.validation import ValidationSet, end_for_want_of_progress, validate, with_validation


@dataclass
class Run:
    """Everything a run needs, wired by ``train.build``.

    Args:
        config: the resolved configuration.
        control: agreements between ranks.
        engine: model and optimizer.
        batches: this rank's micro-batches step by step, positioned at ``state.consumed_samples``.
        data_wait_s: seconds the last step waited for ``batches``.
        validation: this rank's share of the validation sets, none without validation.
        checkpoints: where the state is saved.
        background: saves beside training; over the same ``checkpoints``.
        header: what a checkpoint's manifest says of the run besides the state.
        state: progress so far.
        sinks: where records go; none on ranks other than 0.
        progress: told the number of every finished step.
        sync_metrics: forces the logged rows to the disk; a checkpoint counts on the rows up to its step.
        require_directory: raises a ``StorageError`` when the run directory is gone.
        record_save: told the step of every published checkpoint.
        throughput: speed from counts and times.
        stop: signals received.
        profiler: told of every step before and after it; None where nothing is profiled.
        samples: told of every step, behind all that is measured of it; None where no text is sampled.
        save_time_s: for which saves have stopped training since the last logged step.
        failed_saves: in a row.
        saved_step: of the newest published checkpoint.
        has_waited: a save has waited for the one before, which is said once.
    """

    config: Config
    control: ControlGroup
    engine: Engine
    batches: Iterator[list[PackedBatch]]
    data_wait_s: Callable[[], float]
    validation: Sequence[ValidationSet]
    checkpoints: CheckpointManager
    background: BackgroundSaver
    header: Header
    state: TrainState
    sinks: Sequence[Sink]
    progress: Callable[[int], None]
    sync_metrics: Callable[[], None]
    require_directory: Callable[[], None]
    record_save: Callable[[int], None]
    throughput: Throughput
    stop: StopRequest
    profiler: StepProfiler | None = None
    samples: TrainingSamples | None = None
    save_time_s: float = 0.0
    failed_saves: int = 0
    saved_step: int = field(default=-1)
    has_waited: bool = False


class _Contents(TypedDict):
    step: int
    fragments: Sequence[Fragment]
    train_state: TrainState
    rank_tensors: Mapping[str, torch.Tensor]
    header: Header


def train(run: Run) -> str | None:
    """Train until the last step, a stop, or too many validations without progress (``eval.patience``).

    Returns:
        The name of the signal that stopped the run, or None when it is finished.

    Raises:
        DivergedError: too many consecutive non-finite steps.
        StorageError: the run directory is gone, or checkpoints cannot be written any more.
    """
    try:
        return _train(run)
    finally:
        # Whatever ends training: what is in flight may still become a checkpoint, and the process must not end before.
        _conclude_save(run)
        run.background.close()


def _train(run: Run) -> str | None:
    run.saved_step = run.state.step
    run.stop.defer()
    stopped_by = _end_step(run)
    while stopped_by is None and not _is_done(run):
        started_at = time.monotonic()
        step = run.state.step + 1
        if run.profiler is not None:
            run.profiler.before(step)
        batches = next(run.batches)
        totals = StepTotals.over_ranks(batches, run.control.sum_ints)
        report = _report_due(run.config, step)
        lr = learning_rate(run.config, step, run.state.rewarmup)
        result = run.engine.train_step(
            batches, totals=totals, lr=lr, report=report, before_update=lambda: _let_copy(run)
        )
        speed = _account(run, totals, result, step_time_s=time.monotonic() - started_at)
        if report is not Report.NONE:
            _log(run, result.metrics | speed)
        if run.profiler is not None:
            run.profiler.after(step)
        run.progress(step)
        _check_divergence(run)
        if run.samples is not None:
            run.samples.take(step, is_last=_is_done(run))
        stopped_by = _end_step(run)
        is_last = stopped_by is not None or _is_done(run)
        if is_last or _save_due(run.config, step):
            with _stopping_training(run):
                save(run, must_succeed=is_last)
    return stopped_by


def save(run: Run, *, must_succeed: bool) -> None:
    """Publish a checkpoint of the current step, once, or begin to while training goes on.

    A failed periodic save costs nothing but the distance to the last good one, so training goes on and the
    next interval tries again, until ``checkpoint.max_failures`` in a row have failed.

    Args:
        run: between two steps.
        must_succeed: return when it is published, and raise when it is not.

    Raises:
        DivergedError: weights or moments are not finite.
        StorageError: the run directory is gone, or the save failed and was the last chance, or too many failed in a
            row. Of a save that goes on beside training both are raised by a later call or at a step's end.
    """
    _wait_for_former(run, must_succeed=must_succeed)
    if run.saved_step == run.state.step:
        return
    _together(run, run.require_directory, "run directory lost")

    def begin() -> SaveReport | None:
        _together(run, run.sync_metrics, f"checkpoint of step {run.state.step} not saved")
        contents: _Contents = {
            "step": run.state.step,
            "fragments": list(run.engine.fragments()),
            "train_state": run.state,
            "rank_tensors": rng_state(),
            "header": run.header,
        }
        if not must_succeed and run.background.start(**contents):
            return None
        return run.checkpoints.save(**contents)

    _account_for(run, begin, must_succeed=must_succeed)


def _wait_for_former(run: Run, *, must_succeed: bool) -> None:
    """Two states are never in flight: they would share one buffer."""
    former = run.background.step
    if former is None:
        return
    waiting_since = time.monotonic()
    _finish_save(run)
    if not must_succeed and not run.has_waited:
        run.has_waited = True
        get_logger().info(
            "checkpoint: that of step %d is due while that of step %d was still being written: waited %.1f s; "
            "training waits whenever saves take longer than checkpoint.interval (said once)",
            run.state.step,
            former,
            time.monotonic() - waiting_since,
        )


def _finish_save(run: Run) -> None:
    """Wait for the save in flight and account for it, on all ranks together."""
    _account_for(run, run.background.finish, must_succeed=False)


def _account_for(run: Run, outcome: Callable[[], SaveReport | None], *, must_succeed: bool) -> None:
    """Take up what a save came to, None while that is not known."""
    try:
        report = outcome()
    except StorageError as error:
        run.failed_saves += 1
        if must_succeed or run.failed_saves >= run.config.checkpoint.max_failures:
            raise
        _together(run, run.require_directory, "run directory lost")
        get_logger().warning("%s; training goes on, the next checkpoint will try again", error)
    except DivergedError as error:
        raise DivergedError(f"{error}; {_way_back(run)}") from error
    else:
        _note(run, report)


def _note(run: Run, report: SaveReport | None) -> None:
    if report is not None:
        run.failed_saves = 0
        run.saved_step = report.step
        run.record_save(report.step)


def _conclude_save(run: Run) -> None:
    """Wait for the save in flight where training is over; other ranks may be gone."""
    _note(run, run.background.conclude())


def _let_copy(run: Run) -> None:
    with _stopping_training(run):
        run.background.wait_for_copy()


@contextmanager
def _stopping_training(run: Run) -> Iterator[None]:
    """What is done inside counts as time of saves."""
    started_at = time.monotonic()
    yield
    run.save_time_s += time.monotonic() - started_at


def _together(run: Run, action: Callable[[], object], what: str) -> None:
    """Do something on every rank; raise on every rank when it fails on one."""
    try:
        run_together(run.control, lambda: (action(), None))
    except StageFailed as failed:
        raise failed.to_error(what) from failed


def _report_due(config: Config, step: int) -> Report:
    due = step % config.logging.interval == 0 or step == config.run.steps or _eval_due(config, step)
    if not due:
        return Report.NONE
    layers = config.logging.layer_interval
    return Report.LAYERS if layers and step % layers == 0 else Report.SUMMARY


def _eval_due(config: Config, step: int) -> bool:
    interval = config.eval.interval
    return interval > 0 and (step % interval == 0 or step == config.run.steps)


def _save_due(config: Config, step: int) -> bool:
    interval = config.checkpoint.interval
    return interval > 0 and step % interval == 0


def _is_done(run: Run) -> bool:
    is_early = end_for_want_of_progress(run.state, run.config) is not None
    return is_early or run.state.step >= run.config.run.steps


def _account(run: Run, totals: StepTotals, result: StepResult, *, step_time_s: float) -> dict[str, float]:
    """Advance the state by one step and return its ``perf/*`` metrics."""
    flops = training_flops(
        run.config.model, num_tokens=totals.num_tokens, sum_squared_lengths=totals.sum_squared_lengths
    )
    speed = run.throughput.record_step(
        flops=flops, tokens=totals.num_tokens, step_time_s=step_time_s, data_wait_s=run.data_wait_s()
    )
    state = run.state
    run.state = replace(
        state,
        step=state.step + 1,
        consumed_samples=state.consumed_samples + batch_size(run.config, state.step + 1),
        consumed_tokens=state.consumed_tokens + totals.num_tokens,
        flops_total=run.throughput.flops_total,
        skipped_steps=state.skipped_steps + int(result.skipped),
        optimizer_step=state.optimizer_step + int(not result.skipped),
        consecutive_skips=state.consecutive_skips + 1 if result.skipped else 0,
        validation={},
    )
    return speed


def _log(run: Run, metrics: dict[str, float]) -> None:
    state = run.state
    record = {"step": state.step, "tokens": state.consumed_tokens, **metrics}
    record["optim/skipped_steps"] = state.skipped_steps
    if torch.cuda.is_initialized():
        record["mem/peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    if run.config.logging.step_parts:
        record["perf/save_s"], run.save_time_s = run.save_time_s, 0.0
    if run.validation and _eval_due(run.config, state.step):
        evaluating_since = time.monotonic()
        # Rank 0's values: an end that the ranks see differently would leave some waiting for the others.
        found: dict[str, float] = run.control.broadcast_json(validate(run.engine, run.validation))
        record |= found
        run.state = with_validation(state, found, run.validation, run.config)
        if run.config.logging.step_parts:
            record["perf/eval_s"] = time.monotonic() - evaluating_since
    for sink in run.sinks:
        sink.log(record)


def _check_divergence(run: Run) -> None:
    num_skips = run.state.consecutive_skips
    if num_skips >= run.config.run.max_skipped_steps:
        _conclude_save(run)
        raise DivergedError(
            f"step {run.state.step}: gradients were not finite for {num_skips} steps in a row "
            f"(run.max_skipped_steps); {_way_back(run)}"
        )


def _way_back(run: Run) -> str:
    """What to do about a run that diverged: the same line would only diverge again."""
    try:
        good = run.checkpoints.find_last_good()
    except StorageError as error:
        return f"{error}"
    lower = f"a lower optimizer.lr than {run.config.optimizer.lr:g}"
    if good is None:
        return f"there is no checkpoint from before: choose another run.dir and {lower}"
    return (
        f"go back to the last good checkpoint, or an older one, with {lower}: --resume.from {good} "
        "--optimizer.lr LOWER --resume.accept optimizer.lr"
    )


def _end_step(run: Run) -> str | None:
    """Take up a save that all ranks have finished.

    Returns:
        The signal some rank was sent, if any: all ranks stop at the same step.
    """
    num_stopped, num_writing = run.control.sum_ints([run.stop.requested is not None, run.background.is_writing])
    if run.background.step is not None and not num_writing:
        with _stopping_training(run):
            _finish_save(run)
    if not num_stopped:
        return None
    return next(name for name in run.control.gather_json(run.stop.requested) if name)
