"""What checkpoints cost training: step times without saves, with saves that are waited for, with saves beside training.

``python scripts/benchmarks/bench_saves.py --json saves.json`` trains 2.4 B parameters on one GPU (four layers of the
80B with 128 experts; ``--config`` and overrides for others) through the loop of ``train``, on random tokens, with
a save every ``--interval`` steps. It needs room for two checkpoints below ``--dir``, 57 GB, and for one in host memory.

Unless ``--accumulation`` says how many micro-batches a step has, one checkpoint is first written and waited for, and a
step then gets as many as make an interval a quarter longer than that: nothing hides a save that takes longer than the
steps until the next. Times are means over the steps of whole intervals; saves beside training are timed from their
second on, as the first takes the memory. ``stopped`` is how long a save has kept training from going on, ``written``
from its begin until it was published, ``GB/s`` the size of a checkpoint by that.

``--read-back`` times one checkpoint alone instead: written, verified (every byte is read from the disk and hashed) and,
after a further step, loaded into the engine, from what verifying has left in host memory. What the engine then holds is
compared with what was saved. A rank of the 80B over eight GPUs has 64 experts: ``--config qwen3next_80b_8xh200.yaml
--parallel.expert_parallel_size 1 --model.num_experts 64``, with ``--model.num_hidden_layers`` as GPU and disk allow.
All that is not an expert is then one process's, not an eighth.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from bench_command import count, run_main, scratch_folder
from bench_shapes import random_batch
from device_timing import GIB, synchronize

from qwen3next_train.batch import PackedBatch
from qwen3next_train.checkpoint.background import BackgroundSaver
from qwen3next_train.checkpoint.fragments import FragmentReader
from qwen3next_train.checkpoint.manager import CheckpointManager, SaveReport
from qwen3next_train.checkpoint.manifest import Header, WorldLayout
from qwen3next_train.checkpoint.train_state import TrainState
from qwen3next_train.cli.arguments import Option, parse_arguments
from qwen3next_train.config.load import load_config
from qwen3next_train.config.presets import find_config
from qwen3next_train.config.schema import Config
from qwen3next_train.engine.base import Engine
from qwen3next_train.errors import ConfigError
from qwen3next_train.kernels.selection import DTYPES, select_kernels
from qwen3next_train.metrics.sinks import JsonlSink
from qwen3next_train.metrics.throughput import Throughput
from qwen3next_train.parallel.process_groups import ProcessContext, process_context
from qwen3next_train.parameters import parameter_table
from qwen3next_train.topology import Topology
from qwen3next_train.train.loop import Run, train
from qwen3next_train.train.memory_check import has_host_room
from qwen3next_train.versions import software_versions

OPTIONS = {
    option.name: option
    for option in (
        Option("--config", "FILE", "configuration (default bench_slice4_e512.yaml with 128 experts)"),
        Option("--dir", "FOLDER", "where checkpoints go, in a folder that is removed (default: of temporary files)"),
        Option("--interval", "N", "steps between saves (default 5)"),
        Option("--intervals", "N", "timed intervals with saves beside training (default 2); of the others one"),
        Option("--accumulation", "N", "micro-batches a step (default: from the time of one save)"),
        Option("--read-back", "", "time one checkpoint: written, verified, loaded; nothing beside training"),
        Option("--json", "FILE", "write everything as JSON too, after each row"),
    )
}
_SLACK = 1.25
"""Time of an interval over that of a save that is waited for."""
_BITS = {2: torch.int16, 4: torch.int32}
"""Whole numbers as wide as an element of so many bytes."""


@dataclass(frozen=True)
class Outcome:
    """What came of one kind of saves.

    Args:
        saves: ``none``, ``waited for`` or ``beside training``.
        step_s: seconds of each timed step, what stopped training behind it included.
        stopped_s: seconds for which each timed save has stopped training.
        written_s: seconds from a save's begin until it was published.
        num_bytes: of one checkpoint, 0 without saves.
        peak_bytes: device memory in tensors at the worst moment.
    """

    saves: str
    step_s: list[float]
    stopped_s: list[float]
    written_s: list[float]
    num_bytes: int
    peak_bytes: int

    @property
    def mean_s(self) -> float:
        """Seconds of a step."""
        return sum(self.step_s) / len(self.step_s)


@dataclass(frozen=True)
class ReadBack:
    """One checkpoint alone.

    Args:
        num_bytes: its size.
        written_s: seconds from the save's begin until it was published.
        verified_s: seconds of reading and hashing it.
        loaded_s: seconds until the engine had its state, after that.
    """

    num_bytes: int
    written_s: float
    verified_s: float
    loaded_s: float


class _Enough(Exception):
    """Ends the loop before the save of its last step, which is waited for."""


def _stop(step: int) -> None:
    raise _Enough


class Bench:
    """An engine and the parts of a run around it.

    Args:
        config: what to train.
        context: one process.
        folder: for checkpoints and rows.
        interval: steps between saves.
    """

    def __init__(self, config: Config, context: ProcessContext, folder: Path, interval: int) -> None:
        from qwen3next_train.engine.zero_engine import ZeroEngine

        self._config = config
        self._context = context
        self._folder = folder
        self._interval = interval
        self._engine: Engine = ZeroEngine(
            config,
            topology=Topology(context.world_size, context.rank),
            kernels=select_kernels(
                config.kernels, context.device, dtype=DTYPES[config.run.precision], model=config.model
            ),
            device=context.device,
            num_micro_batches=1,
        )
        layout = WorldLayout(world_size=1, expert_parallel_size=1, zero_stage=config.parallel.zero_stage)
        self._header = Header(parameter_table(config.model), config.model_dump(mode="json"), layout, {})
        self._batch = random_batch(config, packed=False)

    def save_once(self) -> SaveReport:
        """A checkpoint that is waited for."""
        run, saves = self._run("once", 1, num_steps=1, async_save=False, interval=1)
        train(run)
        shutil.rmtree(self._folder / "once")
        return saves[0]

    def read_back(self) -> ReadBack:
        """A checkpoint written, verified and loaded after a further step.

        Raises:
            AssertionError: the engine does not hold what was saved.
        """
        run, saves = self._run("back", 1, num_steps=1, async_save=False, interval=1)
        train(run)
        saved = self._digests()
        onward, unsaved = self._run("on", 1, num_steps=1, async_save=False, interval=0)
        onward.progress = _stop
        with suppress(_Enough):
            train(onward)
        assert not unsaved, "the disk may have no room for a second checkpoint"
        assert self._digests() != saved, "a step has changed nothing"
        for path in saves[0].path.rglob("*"):
            if path.is_file():
                _forget(path)
        started = time.monotonic()
        found = run.checkpoints.find_latest()
        assert found is not None
        verified = time.monotonic()
        reader = FragmentReader(found.path, found.manifest)
        self._engine.load_state(reader.read, found.manifest.train_state.optimizer_step)
        synchronize(self._context.device)
        loaded = time.monotonic()
        assert self._digests() == saved, "what was loaded is not what was saved"
        for name in ("back", "on"):
            shutil.rmtree(self._folder / name)
        return ReadBack(saves[0].num_bytes, saves[0].duration_s, verified - started, loaded - verified)

    def _digests(self) -> dict[tuple[str, str], int]:
        """Sum of the bits of each part of the state, by parameter and kind."""
        return {
            (fragment.name, kind): int(tensor.view(_BITS[tensor.element_size()]).sum(dtype=torch.int64))
            for fragment in self._engine.fragments()
            for kind, tensor in fragment.tensors.items()
        }

    def micro_batch_s(self) -> float:
        """Seconds of a step of one micro-batch, kernels compiled."""
        return self.measure("none", 1, num_intervals=1).mean_s

    def measure(self, saves: str, accumulation: int, *, num_intervals: int) -> Outcome:
        """Step times of one kind, from the end of one step on, behind which a save is due, to that of another."""
        interval, device = self._interval, self._context.device
        in_background = saves == "beside training"
        first = interval if in_background else 0
        last = first + interval * num_intervals
        run, reports = self._run(
            saves,
            accumulation,
            num_steps=last + 1,
            async_save=in_background,
            interval=0 if saves == "none" else interval,
        )
        ends: list[float] = []
        stopped: list[float] = []

        def progress(step: int) -> None:
            if len(ends) in (first, last):
                synchronize(device)
            ends.append(time.monotonic())
            stopped.append(run.save_time_s)
            run.save_time_s = 0.0
            if len(ends) > last:
                raise _Enough

        run.progress = progress
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with suppress(_Enough):
            train(run)
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        shutil.rmtree(self._folder / saves.replace(" ", "_"))
        steps = [after - before for before, after in itertools.pairwise(ends)][first:]
        if saves == "none":
            return Outcome(saves, steps, [], [], 0, peak)
        # What stopped training behind a step is known at the end of the next.
        behind = stopped[first + 1 :]
        per_save = [sum(behind[start : start + interval]) for start in range(0, len(behind), interval)]
        written = [report.duration_s for report in reports[-num_intervals:]]
        return Outcome(saves, steps, per_save, written, reports[-1].num_bytes, peak)

    def _run(
        self, name: str, accumulation: int, *, num_steps: int, async_save: bool, interval: int
    ) -> tuple[Run, list[SaveReport]]:
        config, context = self._config, self._context
        directory = self._folder / name.replace(" ", "_")
        directory.mkdir()
        # The first step is one behind which a save is due.
        first = max(interval - 1, 0)
        batch_size = accumulation * config.run.micro_batch_size
        config = config.model_copy(
            update={
                "run": config.run.model_copy(update={"steps": first + num_steps, "global_batch_size": batch_size}),
                "checkpoint": config.checkpoint.model_copy(update={"interval": interval, "keep": 1}),
            }
        )
        checkpoints = _Reported(directory / "checkpoints", control=context.saving, keep=1)
        sink = JsonlSink(directory / "metrics.jsonl", resume_step=0)
        batches: list[PackedBatch] = [self._batch] * accumulation
        run = Run(
            config=config,
            control=context.control,
            engine=self._engine,
            batches=itertools.repeat(batches),
            data_wait_s=lambda: 0.0,
            validation=[],
            checkpoints=checkpoints,
            background=BackgroundSaver(
                checkpoints,
                control=context.control,
                device=context.device,
                enabled=async_save,
                has_room=lambda num_bytes: has_host_room(num_bytes, num_local=1),
            ),
            header=self._header,
            state=TrainState(
                step=first,
                consumed_samples=0,
                consumed_tokens=0,
                flops_total=0,
                skipped_steps=0,
                optimizer_step=0,
                data_fingerprint="",
            ),
            sinks=[sink],
            progress=lambda step: None,
            sync_metrics=sink.sync,
            require_directory=lambda: None,
            record_save=lambda step: None,
            throughput=Throughput(None, 1),
            stop=cast(Any, SimpleNamespace(requested=None, defer=lambda: None)),
        )
        return run, checkpoints.reports


def _forget(path: Path) -> None:
    """Have the host drop a file's pages, which are on the disk, so that they are read from there."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


class _Reported(CheckpointManager):
    """Keeps the reports of its saves."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.reports: list[SaveReport] = []

    def save(self, **contents: Any) -> SaveReport:
        """See :class:`CheckpointManager`."""
        self.reports.append(super().save(**contents))
        return self.reports[-1]


def format_outcome(outcome: Outcome, without: Outcome) -> str:
    """One line of the table."""
    line = f"{outcome.saves:<16}{1e3 * outcome.mean_s:10.1f}{100 * (outcome.mean_s / without.mean_s - 1):9.1f}"
    if not outcome.stopped_s:
        return f"{line}{'-':>11}{'-':>10}{'-':>7}{outcome.peak_bytes / GIB:7.1f}"
    stopped = sum(outcome.stopped_s) / len(outcome.stopped_s)
    written = sum(outcome.written_s) / len(outcome.written_s)
    rate = outcome.num_bytes / written / 1e9
    return f"{line}{stopped:11.3f}{written:10.2f}{rate:7.2f}{outcome.peak_bytes / GIB:7.1f}"


def format_read_back(back: ReadBack, num_parameters: int) -> str:
    """The lines of a checkpoint alone."""
    size = back.num_bytes / 1e9
    times = {"written": back.written_s, "verified": back.verified_s, "loaded": back.loaded_s}
    lines = [f"{name:<16}{seconds:10.2f} s{size / seconds:7.2f} GB/s" for name, seconds in times.items()]
    return "\n".join([f"{num_parameters:,} parameters, {size:.2f} GB", *lines])


HEADER = f"{'saves':<16}{'mean ms':>10}{'% more':>9}{'stopped s':>11}{'written s':>10}{'GB/s':>7}{'GiB':>7}"


def main(argv: list[str]) -> int:
    """Measure what the command line asks for."""
    args = parse_arguments(argv, OPTIONS)
    name = args.last("--config")
    overrides = [("model.num_experts", "128")] if name is None else []
    config = load_config([find_config(name or "bench_slice4_e512.yaml")], [*overrides, *args.overrides]).config
    interval = count("--interval", args.last("--interval") or "5")
    num_intervals = count("--intervals", args.last("--intervals") or "2")
    with (
        scratch_folder(args.last("--dir"), "bench_saves-") as folder,
        process_context(config.run.device) as context,
    ):
        if context.world_size > 1:
            raise ConfigError("measures one process; start it without a launcher")
        print(", ".join(f"{name} {version}" for name, version in software_versions().items() if version))
        bench = Bench(config, context, Path(folder), interval)
        num_parameters = sum(spec.numel for spec in parameter_table(config.model))
        heading = {
            "date": time.strftime("%Y-%m-%d"),
            "versions": software_versions(),
            "device": torch.cuda.get_device_name() if context.device.type == "cuda" else "cpu",
            "num_parameters": num_parameters,
        }
        target = args.last("--json")
        if "--read-back" in args.options:
            back = bench.read_back()
            print(format_read_back(back, num_parameters))
            if target is not None:
                Path(target).write_text(json.dumps(heading | asdict(back), indent=2) + "\n", encoding="utf-8")
            return 0
        micro_batch_s = bench.micro_batch_s()
        if given := args.last("--accumulation"):
            accumulation = count("--accumulation", given)
        else:
            alone_s = bench.save_once().duration_s
            accumulation = math.ceil(_SLACK * alone_s / (interval * micro_batch_s))
            print(f"a save alone {alone_s:.2f} s")
        print(f"{num_parameters:,} parameters, a save every {interval} steps of {accumulation} micro-batches")
        print(HEADER, flush=True)
        outcomes: list[Outcome] = []
        for saves in ("none", "beside training", "waited for"):
            outcomes.append(
                bench.measure(saves, accumulation, num_intervals=num_intervals if saves == "beside training" else 1)
            )
            print(format_outcome(outcomes[-1], outcomes[0]), flush=True)
            if target is not None:
                found = {
                    **heading,
                    "interval": interval,
                    "accumulation": accumulation,
                    "results": [{**asdict(each), "mean_s": each.mean_s} for each in outcomes],
                }
                Path(target).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_main(main, __doc__, OPTIONS)
