"""How long whole optimizer steps take on 1, 2 and 4 GPUs, and what they consist of.

``python scripts/benchmarks/bench_steps.py`` (``make bench-steps``) measures both shipped shapes at every layout of
:data:`LAYOUTS` that the machine has GPUs for, with one and with four micro-batches a step. The first layout of a shape
is its proxy: one GPU that holds as many experts as a rank of four, so it does the same work and exchanges nothing.
The others' rates are also given as a share of the proxy's, measured in the same call.

Steps run through the training engine on random tokens with a learning rate of 0, so that routing stays as it begins:
nearly uniform. Each row of the table is the median of whole steps, one behind the other; the parts are means of three
steps under torch's profiler on rank 0, in milliseconds of the device: what ran inside the named functions, and NCCL's
kernels by kind (the dense exchange's gathers of tokens are part of ``gather``). ``exposed`` is NCCL without anything
beside it, ``idle`` the time in which nothing runs, ``waits`` how often the host waits for the device in a step.
``plan`` is what ``plan`` says the peak is.

With ``--long`` rows are long instead: twelve layers on all GPUs (``--gpus``) at every length and context-parallel size
of :data:`LONG_ROWS`, one row a micro-batch, so that tokens per GPU are equal along a diagonal of the two.

Letters: EP ranks that share one set of experts, Z the ZeRO stage, CP ranks that share the tokens of a row.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bench_command import run_main
from bench_shapes import model_flops, random_batch
from device_timing import GIB, measure, synchronize

from qwen3next_train.accounting.layout import Layout
from qwen3next_train.accounting.memory import memory_per_gpu
from qwen3next_train.cli.arguments import Option, parse_arguments
from qwen3next_train.config.load import load_config
from qwen3next_train.config.presets import find_config
from qwen3next_train.config.schema import Config
from qwen3next_train.engine.base import Report, StepTotals
from qwen3next_train.errors import ConfigError
from qwen3next_train.kernels.selection import DTYPES, select_kernels
from qwen3next_train.parallel.process_groups import ProcessContext, process_context
from qwen3next_train.row_slices import RowSlice
from qwen3next_train.versions import software_versions

OPTIONS = {
    option.name: option
    for option in (
        Option("--gpus", "N", "largest number of GPUs (default: all)"),
        Option("--iters", "N", "timed steps of each row (default 8)"),
        Option("--long", "", "measure long rows over several GPUs instead"),
        Option("--only", "WORDS", "measure rows whose name (slice4_e512/EP4xZ1/acc4) has all these words: EP4,acc4"),
        Option("--exchange", "KIND", "parallel.token_exchange of every row: auto, dense, exact (the default)"),
        Option(
            "--in-flight",
            "N",
            "parallel.micro_batches_in_flight of the rows of several GPUs: 1 (the default) or 2, where there is one "
            "micro-batch a step two of half the rows",
        ),
        Option("--json", "FILE", "write everything as JSON too, after each row"),
        Option("--worker", "JSON", "measure one row; how ranks are started"),
    )
}
_PROFILED_STEPS = 3
"""More than one, since what is hidden behind the next step is exposed behind the last."""


@dataclass(frozen=True)
class Row:
    """One thing to measure.

    Args:
        shape: of the table's first column.
        label: of the layout.
        num_gpus: processes.
        accumulation: micro-batches a step and rank.
        overrides: configuration keys and values beside the shape's.
    """

    shape: str
    label: str
    num_gpus: int
    accumulation: int
    overrides: tuple[tuple[str, str], ...]

    @property
    def name(self) -> str:
        """As ``--only`` matches it."""
        return f"{self.shape}/{self.label}/acc{self.accumulation}"

    @property
    def config(self) -> Config:
        """The resolved configuration."""
        config = load_config([find_config(f"bench_{self.shape}.yaml")], list(self.overrides)).config
        rows = config.run.micro_batch_size * self.accumulation * self.num_gpus
        rows //= config.parallel.context_parallel_size
        return load_config(
            [find_config(f"bench_{self.shape}.yaml")],
            [*self.overrides, ("run.global_batch_size", str(rows)), ("optimizer.lr", "1e-9"), ("schedule.min_lr", "0")],
        ).config


LAYOUTS = (
    (1, 1, 1),
    *((2, 2, 1), (2, 1, 1), (2, 2, 2), (2, 2, 3)),
    *((4, 4, 1), (4, 2, 1), (4, 4, 2), (4, 4, 3)),
)
"""GPUs, expert-parallel size, ZeRO stage. The first is the proxy."""
_EXPERTS_OF_A_RANK = {"slice4_e512": 128, "ep8_proxy": 64}
"""At an expert-parallel size of four, and in the proxy."""


def all_rows() -> Iterator[Row]:
    """Every row of the table, by shape, then layout."""
    for shape, experts in _EXPERTS_OF_A_RANK.items():
        for num_gpus, expert_parallel_size, zero_stage in LAYOUTS:
            # Where two ranks share the experts, there are as many as two ranks of four have.
            num_experts = experts * max(expert_parallel_size, num_gpus if num_gpus == 4 else 1)
            for accumulation in (1, 4):
                overrides = {
                    "model.num_experts": num_experts,
                    "parallel.expert_parallel_size": expert_parallel_size,
                    "parallel.zero_stage": zero_stage,
                }
                data_parallel = num_gpus // expert_parallel_size
                label = f"EP{expert_parallel_size}" + (f"xDP{data_parallel}" if data_parallel > 1 else "")
                label = "proxy" if num_gpus == 1 else f"{label}xZ{zero_stage}"
                pairs = tuple((key, str(value)) for key, value in overrides.items())
                yield Row(shape, label, num_gpus, accumulation, pairs)


def _in_flight(row: Row) -> Row:
    """The same tokens, two micro-batches of which pass through the model together."""
    together = replace(row, overrides=(*row.overrides, ("parallel.micro_batches_in_flight", "2")))
    if row.accumulation > 1:
        return together
    halved = ("run.micro_batch_size", str(row.config.run.micro_batch_size // 2))
    return replace(together, accumulation=2, overrides=(*together.overrides, halved))


LONG_ROWS = tuple((length, size) for length in (16, 32, 64, 128) for size in (1, 2, 4) if length // size <= 64)
"""Thousands (1024) of tokens in a row, context-parallel size."""


def long_rows(num_gpus: int) -> Iterator[Row]:
    """Twelve layers of the 80B with 64 experts to each rank, rows of one document.

    Gradients and moments are narrow, which leaves 20 GiB more for the tokens.

    Args:
        num_gpus: 2 or 4; sizes of context parallelism that do not divide them are left out.
    """
    for length, context_parallel_size in LONG_ROWS:
        if num_gpus % context_parallel_size:
            continue
        overrides = {
            "model.num_experts": 64 * num_gpus,
            "parallel.expert_parallel_size": num_gpus,
            "parallel.context_parallel_size": context_parallel_size,
            "parallel.recompute": "[norms, activations, gdn_prologue]",
            "parallel.gradient_dtype": "bf16",
            "optimizer.moments_dtype": "bf16",
            "run.micro_batch_size": 1,
            "data.sequence_length": 1024 * length,
        }
        pairs = tuple((key, str(value)) for key, value in overrides.items())
        yield Row("ep8_proxy", f"{length}kxCP{context_parallel_size}", num_gpus, 1, pairs)


@dataclass(frozen=True)
class Outcome:
    """What came of a row, on rank 0.

    Args:
        ms: milliseconds of each timed step.
        tflops: model TFLOP/s of a GPU at the median.
        peak_bytes: device memory in tensors at the worst moment.
        plan_bytes: what :func:`memory_per_gpu` says of it, the runtime left out.
        parts: device milliseconds of one step by part.
        exposed_ms: NCCL kernels beside which nothing ran.
        idle_ms: nothing ran.
        host_waits: calls in which the host waits for the device.
        error: why there are no figures, or empty.
    """

    ms: tuple[float, ...] = ()
    tflops: float = 0.0
    peak_bytes: int = 0
    plan_bytes: int = 0
    parts: dict[str, float] | None = None
    exposed_ms: float = 0.0
    idle_ms: float = 0.0
    host_waits: int = 0
    error: str = ""

    @property
    def median(self) -> float:
        """Milliseconds of a step."""
        return statistics.median(self.ms)


def measure_row(row: Row, context: ProcessContext, *, iterations: int, config: Config | None = None) -> Outcome:
    """Build the engine, run steps, take it down.

    Args:
        row: what to measure.
        context: the ranks, as many as the row's GPUs.
        iterations: timed steps.
        config: instead of the row's, for tests.
    """
    from qwen3next_train.engine.step_profile import named_parts, new_profiler, read_profile
    from qwen3next_train.engine.zero_engine import ZeroEngine

    config = config or row.config
    device = context.device
    topology = context.topology(config.parallel)
    engine = ZeroEngine(
        config,
        topology=topology,
        kernels=select_kernels(config.kernels, device, dtype=DTYPES[config.run.precision], model=config.model),
        device=device,
        num_micro_batches=row.accumulation,
    )
    first = topology.data_parallel_rank * row.accumulation
    part = RowSlice.of(topology, config.model)
    batches = [random_batch(config, packed=False, seed=first + index).cut(part) for index in range(row.accumulation)]
    totals = StepTotals.over_ranks(batches, context.control.sum_ints)

    def step() -> None:
        engine.train_step(batches, totals=totals, lr=0.0, report=Report.NONE)

    timing = measure(step, device, iterations=iterations)
    # Of all ranks: a later slice of a row has more of its attention than an earlier one.
    flops = sum(context.control.sum_ints([model_flops(config, batch) for batch in batches])) // context.world_size
    plan = memory_per_gpu(config.model, Layout.of(config, context.world_size, ranks_per_node=context.ranks_per_node))
    with named_parts(), new_profiler(device) as profiler:
        # Profilers do not start at once everywhere; who is late would be waited for, as if it were communication.
        context.control.any_true(False)
        for _ in range(_PROFILED_STEPS):
            step()
        synchronize(device)
    profiled = read_profile(list(profiler.events()), device, _PROFILED_STEPS)
    return Outcome(
        ms=timing.ms,
        tflops=flops / timing.median / 1e9,
        peak_bytes=timing.peak_bytes,
        plan_bytes=sum(plan.values()) - plan["runtime"],
        parts=profiled.parts,
        exposed_ms=profiled.exposed_ms,
        idle_ms=profiled.idle_ms,
        host_waits=round(profiled.host_waits),
    )


def format_row(row: Row, outcome: Outcome, proxy: Outcome | None) -> str:
    """One line of the table."""
    name = f"{row.shape:<13}{row.label:<12}{row.accumulation:>3}"
    if outcome.error:
        return f"{name}  {outcome.error}"
    assert outcome.parts is not None
    share = f"{100 * proxy.median / outcome.median:5.1f}" if proxy is not None else "    -"
    parts = "".join(f"{outcome.parts[part]:8.1f}" for part in outcome.parts)
    return (
        f"{name}{outcome.median:9.1f}{outcome.tflops:8.1f}{share:>7}{parts}{outcome.exposed_ms:8.1f}"
        f"{outcome.idle_ms:8.1f}{outcome.host_waits:6d}{outcome.peak_bytes / GIB:7.1f}{outcome.plan_bytes / GIB:7.1f}"
    )


HEADER = (
    f"{'shape':<13}{'layout':<12}{'acc':>3}{'median ms':>9}{'TFLOP/s':>8}{'% proxy':>8}"
    f"{'model':>7}{'exchg':>8}{'accum':>8}{'reduce':>8}{'norm':>8}{'AdamW':>8}{'gather':>8}"
    f"{'exposed':>8}{'idle':>8}{'waits':>6}{'GiB':>7}{'plan':>7}"
)


def _work(row: Row, iterations: int) -> None:
    """What each rank does; rank 0 prints a line of JSON."""
    with process_context(row.config.run.device) as context:
        error = ""
        try:
            outcome = measure_row(row, context, iterations=iterations)
        except torch.OutOfMemoryError:
            error = "out of memory"
        # A rank that has no memory left ends the row for all.
        if context.control.any_true(bool(error)):
            outcome = Outcome(error="out of memory")
        if context.rank == 0:
            print("ROW " + json.dumps(asdict(outcome)), flush=True)


def _measure_apart(row: Row, iterations: int) -> Outcome:
    """By ranks of its own: an engine leaves memory behind in its process."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", str(row.num_gpus), __file__]
    command = [*torchrun, "--worker", json.dumps(asdict(row)), "--iters", str(iterations)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    found = [line.removeprefix("ROW ") for line in done.stdout.splitlines() if line.startswith("ROW ")]
    if done.returncode != 0 or not found:
        return Outcome(error=f"the ranks ended with {done.returncode}, see above")
    return Outcome(**json.loads(found[0]))


def main(argv: list[str]) -> int:
    """Measure what the command line asks for."""
    args = parse_arguments(argv, OPTIONS)
    iterations = int(args.last("--iters") or 8)
    if iterations < 1:
        raise ConfigError("--iters: give a whole number > 0")
    worker = args.last("--worker")
    if worker is not None:
        row = json.loads(worker)
        _work(Row(**row | {"overrides": tuple(map(tuple, row["overrides"]))}), iterations)
        return 0
    num_gpus = int(args.last("--gpus") or torch.cuda.device_count())
    words = [word for word in (args.last("--only") or "").replace("/", ",").split(",") if word]
    known = long_rows(num_gpus) if "--long" in args.options else all_rows()
    rows = [row for row in known if row.num_gpus <= num_gpus and all(word in row.name for word in words)]
    if not rows:
        raise ConfigError(f"nothing to measure with {num_gpus} GPUs and --only {','.join(words)}")
    exchange = ("parallel.token_exchange", args.last("--exchange") or "exact")
    rows = [replace(row, overrides=(*row.overrides, exchange)) for row in rows]
    if args.last("--in-flight") == "2":
        rows = [_in_flight(row) if row.num_gpus > 1 else row for row in rows]
    target = args.last("--json")
    print(", ".join(f"{name} {version}" for name, version in software_versions().items() if version))
    print(HEADER, flush=True)
    proxies: dict[tuple[str, int], Outcome] = {}
    results: list[dict[str, Any]] = []
    for row in rows:
        outcome, key = _measure_apart(row, iterations), (row.shape, row.config.run.global_batch_size // row.num_gpus)
        if row.label == "proxy" and not outcome.error:
            proxies[key] = outcome
        print(format_row(row, outcome, proxies.get(key)), flush=True)
        results.append({"row": row.name, **asdict(outcome)})
        if target is not None:
            report = {"date": time.strftime("%Y-%m-%d"), "versions": software_versions(), "results": results}
            Path(target).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_main(main, __doc__, OPTIONS)
