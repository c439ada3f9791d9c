"""Profiles and memory snapshots of a run, into ``RUN/profile``. Nothing here is imported or done unless asked for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qwen3next_train.config.schema import Config
from qwen3next_train.config.validate import profiled_steps
from qwen3next_train.exhaustion import is_out_of_memory, system_reason
from qwen3next_train.log import get_logger
from qwen3next_train.parallel.process_groups import ProcessContext

if TYPE_CHECKING:
    from torch.profiler import profile

FOLDER_NAME = "profile"

_MAX_HISTORY = 100_000
"""Allocations and frees that a memory snapshot goes back to."""


class StepProfiler:
    """Profiles consecutive steps of this rank and writes a trace and a table when they are done.

    A profile that cannot be written costs the profile, not the run.

    Args:
        steps: to profile; of a run that goes on within them, the rest.
        folder: where files go; created.
        rank: of this process.
        device: where the model is.
        with_memory: record allocations in these steps, too, and write a snapshot after the last.
        goes_on_recording: they are recorded before and after these steps as well.
    """

    def __init__(
        self,
        steps: range,
        folder: Path,
        *,
        rank: int,
        device: torch.device,
        with_memory: bool,
        goes_on_recording: bool = False,
    ) -> None:
        self._steps = steps
        self._folder = folder
        self._rank = rank
        self._device = device
        self._with_memory = with_memory and _records_memory(device)
        self._goes_on_recording = goes_on_recording
        self._profiler: profile | None = None
        self._opened = ExitStack()
        self._done: list[int] = []
        self._started_at = 0.0

    def before(self, step: int) -> None:
        """To be called before ``step`` waits for its data."""
        if self._profiler is None and step in self._steps:
            self._start()

    def after(self, step: int) -> None:
        """To be called once ``step`` is logged."""
        if self._profiler is None:
            return
        self._done.append(step)
        if step == self._steps[-1]:
            self._finish()

    def close(self) -> None:
        """Write what there is of a profile that the run's end has cut short."""
        if self._profiler is not None:
            self._finish()

    def _start(self) -> None:
        from qwen3next_train.engine.step_profile import named_parts, new_profiler

        if self._with_memory and not self._goes_on_recording:
            torch.cuda.memory._record_memory_history(max_entries=_MAX_HISTORY)
        self._opened.enter_context(named_parts())
        self._synchronize()
        self._profiler = self._opened.enter_context(new_profiler(self._device))
        self._started_at = time.monotonic()

    def _finish(self) -> None:
        from qwen3next_train.engine.step_profile import profile_table, read_profile

        assert self._profiler is not None
        self._synchronize()
        wall_s = time.monotonic() - self._started_at
        profiler, self._profiler = self._profiler, None
        self._opened.close()
        if not self._done:
            return
        first, last = self._done[0], self._done[-1]
        steps = f"{first}-{last}" if first < last else f"{first}"
        name = f"steps_{steps}_rank_{self._rank}"
        place = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "CPU"

        def write() -> None:
            profiler.export_chrome_trace(str(self._folder / f"{name}.trace.json.gz"))
            profiled = read_profile(list(profiler.events() or ()), self._device, len(self._done))
            heading = f"steps {steps} of rank {self._rank} on {place}"
            lines = profile_table(
                profiled,
                heading=heading,
                on_gpu=self._device.type == "cuda",
                wall_ms=1e3 * wall_s / len(self._done),
            )
            (self._folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

        _write(self._folder, f"profile of steps {steps}: {name}.trace.json.gz, {name}.txt", write)
        if self._with_memory:
            _write_snapshot(self._folder, f"memory_steps_{steps}_rank_{self._rank}.pickle")
            if not self._goes_on_recording:
                torch.cuda.memory._record_memory_history(enabled=None)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def open_profiler(config: Config, context: ProcessContext, run_dir: Path, *, first_step: int) -> StepProfiler | None:
    """This rank's profiler; None where it profiles nothing.

    Args:
        config: the resolved configuration.
        context: this process among the others.
        run_dir: the run directory.
        first_step: the first that will be trained.
    """
    settings = config.logging.profile
    steps = profiled_steps(settings)
    if not steps or (context.rank != 0 and not settings.all_ranks):
        return None
    if steps[-1] < first_step:
        get_logger().info("logging.profile.steps: %s are over, nothing is profiled", settings.steps)
        return None
    return StepProfiler(
        steps,
        run_dir / FOLDER_NAME,
        rank=context.rank,
        device=context.device,
        with_memory="steps" in settings.memory,
        goes_on_recording="out_of_memory" in settings.memory,
    )


@contextmanager
def snapshot_when_out_of_memory(config: Config, context: ProcessContext, run_dir: Path) -> Iterator[None]:
    """Where it is asked for, record all allocations, and write them down when there is no memory for one."""
    if "out_of_memory" not in config.logging.profile.memory or not _records_memory(context.device):
        yield
        return
    torch.cuda.memory._record_memory_history(max_entries=_MAX_HISTORY)
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            _write_snapshot(run_dir / FOLDER_NAME, f"memory_out_of_memory_rank_{context.rank}.pickle")
        raise


def _records_memory(device: torch.device) -> bool:
    if device.type != "cuda":
        get_logger().warning("logging.profile.memory: only a GPU's allocations are recorded, none on CPU")
    return device.type == "cuda"


def _write_snapshot(folder: Path, name: str) -> None:
    _write(folder, f"memory snapshot: {name}", lambda: torch.cuda.memory._dump_snapshot(str(folder / name)))


def _write(folder: Path, what: str, write: Callable[[], None]) -> None:
    try:
        folder.mkdir(exist_ok=True)
        write()
    # The profiler says in a RuntimeError that its file cannot be opened.
    except (OSError, RuntimeError) as error:
        reason = system_reason(error) if isinstance(error, OSError) else " ".join(str(error).split())
        get_logger().warning("%s: not written to %s (%s)", what, folder, reason)
    else:
        get_logger().info("%s in %s", what, folder)
