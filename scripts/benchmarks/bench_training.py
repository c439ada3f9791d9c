"""Training steps of a configuration on its own data: start-up, loss, rate, memory, what a step consists of.

``python scripts/benchmarks/bench_training.py --config qwen3next_80b_8xh200.yaml`` starts one process per GPU
(``--gpus`` for fewer) and trains through the engine, by the configuration's schedule, on the rows that a run would
take. Overrides (``--model.num_hidden_layers 12``) work as for ``qwen3next-train``. Nothing is saved or validated.

Steps are timed one by one, from the end of one to that of the next, their losses read as by a run that logs every step;
the first :data:`_WARM` are left out of the median. ``TFLOP/s`` counts model FLOPs of the rows' documents, recomputation
left out. Then :data:`_PROFILED_STEPS` further steps run under torch's profiler: the parts are rank 0's, and those of
``bench_steps.py``. ``plan`` is what ``plan`` says of the memory, the runtime left out, ``peak`` is of the fullest rank.

Start-up is timed on the slowest rank: ``built`` from the process group until the engine holds weights and states,
``first step`` with compilation and tuning of kernels.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from bench_command import count, run_main
from device_timing import GIB, device_name, synchronize

from qwen3next_train.accounting.flops import training_flops
from qwen3next_train.accounting.layout import Layout
from qwen3next_train.accounting.memory import memory_per_gpu
from qwen3next_train.cli.arguments import Option, parse_arguments
from qwen3next_train.config.batch_size import batch_sizes_after
from qwen3next_train.config.load import load_config
from qwen3next_train.config.presets import find_config
from qwen3next_train.config.schema import Config
from qwen3next_train.config.validate import validate_for_world
from qwen3next_train.data.loader import StepLoader, TrainingData
from qwen3next_train.data.prepare import prepare_stores
from qwen3next_train.engine.base import Report, StepTotals
from qwen3next_train.errors import ConfigError
from qwen3next_train.kernels.selection import DTYPES, select_kernels
from qwen3next_train.optim.schedule import learning_rate
from qwen3next_train.parallel.process_groups import ProcessContext, first_on_each_node, process_context
from qwen3next_train.parameters import parameter_table
from qwen3next_train.row_slices import RowSlice
from qwen3next_train.train.memory_check import check_memory
from qwen3next_train.train.seeding import fix_cpu_threads, seed_everything
from qwen3next_train.versions import software_versions

OPTIONS = {
    option.name: option
    for option in (
        Option("--config", "FILE", "configuration; repeatable, later files win"),
        Option("--gpus", "N", "processes, one per GPU (default: all)"),
        Option("--steps", "N", "timed steps (default: run.steps)"),
        Option("--json", "FILE", "write everything as JSON too"),
        Option("--worker", "", "train as one rank; how ranks are started"),
    )
}
_WARM = 5
"""Steps that the median leaves out, unless there are no others."""
_PROFILED_STEPS = 3


@dataclass(frozen=True)
class Outcome:
    """What came of the steps, the same on all ranks but for the profile, which is rank 0's.

    Args:
        num_gpus: ranks.
        num_parameters: of the whole model.
        built_s: seconds until the slowest rank had its weights and states.
        first_step_s: seconds of the slowest rank's first step.
        host_gib: the most host memory that one rank has had.
        step_s: seconds of each step, the first included.
        loss: next-token loss of each step, nats.
        grad_norm: global gradient norm of each step.
        skipped: steps that changed nothing.
        tokens: of a step, all ranks.
        flops: model FLOPs of all steps behind the first :data:`_WARM`, all ranks.
        peak_bytes: device memory in tensors at the worst moment on the fullest rank, profiled steps left out.
        plan_bytes: what :func:`memory_per_gpu` says of it, the runtime left out.
        parts: milliseconds of one step by part.
        exposed_ms: NCCL kernels beside which nothing ran.
        idle_ms: nothing ran.
        host_waits: calls in which the host waits for the device.
    """

    num_gpus: int
    num_parameters: int
    built_s: float
    first_step_s: float
    host_gib: float
    step_s: tuple[float, ...]
    loss: tuple[float, ...]
    grad_norm: tuple[float, ...]
    skipped: int
    tokens: int
    flops: int
    peak_bytes: int
    plan_bytes: int
    parts: dict[str, float]
    exposed_ms: float
    idle_ms: float
    host_waits: int

    @property
    def timed(self) -> tuple[float, ...]:
        """Seconds of the steps that count."""
        return self.step_s[_WARM:] or self.step_s

    @property
    def median_s(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.timed)

    @property
    def tflops(self) -> float:
        """Model TFLOP/s of a GPU, the rows' documents being a little different in every step."""
        return self.flops / len(self.timed) / self.median_s / self.num_gpus / 1e12


def train(config: Config, context: ProcessContext, num_steps: int) -> Outcome:
    """Build the engine, train, profile. Collective.

    Args:
        config: the resolved configuration, which fits the ranks.
        context: the ranks.
        num_steps: timed steps, at least 1.
    """
    from qwen3next_train.engine.step_profile import named_parts, new_profiler, read_profile
    from qwen3next_train.engine.zero_engine import ZeroEngine

    device, control = context.device, context.control
    layout = Layout.of(config, context.world_size, ranks_per_node=context.ranks_per_node)
    check_memory(config, layout, context)
    topology = context.topology(config.parallel)
    fix_cpu_threads(context.local_world_size)
    seed_everything(config.run.seed)
    data = TrainingData(first_on_each_node(context, lambda: prepare_stores(config)), config)
    control.any_true(False)
    started = time.monotonic()
    engine = ZeroEngine(
        config,
        topology=topology,
        kernels=select_kernels(config.kernels, device, dtype=DTYPES[config.run.precision], model=config.model),
        device=device,
        num_micro_batches=config.run.global_batch_size // config.run.micro_batch_size // topology.data_parallel_size,
    )
    synchronize(device)
    built_s = time.monotonic() - started
    if context.rank == 0:
        print(f"built in {built_s:.1f} s", flush=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step_s: list[float] = []
    metrics: list[dict[str, float]] = []
    flops: list[int] = []
    skipped = 0
    tokens = 0
    with StepLoader(
        data,
        topology=topology,
        batch_sizes=batch_sizes_after(config, 0),
        micro_batch_size=config.run.micro_batch_size,
        mtp_depths=config.model.mtp_num_layers,
        start_sample=0,
        num_prefetch_steps=config.data.num_prefetch_steps,
        part=RowSlice.of(topology, config.model),
    ) as batches:

        def step(number: int) -> None:
            nonlocal skipped, tokens
            own = next(batches)
            totals = StepTotals.over_ranks(own, control.sum_ints)
            lr = learning_rate(config, number)
            result = engine.train_step(own, totals=totals, lr=lr, report=Report.SUMMARY)
            metrics.append(result.metrics)
            skipped, tokens = skipped + result.skipped, totals.num_tokens
            work = {"num_tokens": totals.num_tokens, "sum_squared_lengths": totals.sum_squared_lengths}
            flops.append(training_flops(config.model, **work))

        for number in range(1, num_steps + 1):
            begun = time.monotonic()
            step(number)
            if number == num_steps:
                synchronize(device)
            step_s.append(time.monotonic() - begun)
            if context.rank == 0:
                print(f"step {number}: {metrics[-1]['loss/lm']:.4f} nats, {step_s[-1]:.3f} s", flush=True)
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        losses = tuple(each["loss/lm"] for each in metrics)
        norms = tuple(each["optim/grad_norm"] for each in metrics)
        done = sum(flops[_WARM:] or flops)
        with named_parts(), new_profiler(device) as profiler:
            # Profilers do not start at once everywhere; who is late would be waited for, as if it were communication.
            control.any_true(False)
            for number in range(num_steps + 1, num_steps + 1 + _PROFILED_STEPS):
                step(number)
            synchronize(device)
    profiled = read_profile(list(profiler.events()), device, _PROFILED_STEPS)
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    slowest = control.gather_json([built_s, step_s[0], host, peak])
    plan = memory_per_gpu(config.model, layout)
    return Outcome(
        num_gpus=context.world_size,
        num_parameters=sum(spec.numel for spec in parameter_table(config.model)),
        built_s=max(each[0] for each in slowest),
        first_step_s=max(each[1] for each in slowest),
        host_gib=max(each[2] for each in slowest),
        step_s=tuple(step_s),
        loss=losses,
        grad_norm=norms,
        skipped=skipped,
        tokens=tokens,
        flops=done,
        peak_bytes=max(each[3] for each in slowest),
        plan_bytes=sum(plan.values()) - plan["runtime"],
        parts=profiled.parts,
        exposed_ms=profiled.exposed_ms,
        idle_ms=profiled.idle_ms,
        host_waits=round(profiled.host_waits),
    )


def format_outcome(outcome: Outcome) -> str:
    """The table."""
    parts = " · ".join(f"{part} {ms:.1f}" for part, ms in outcome.parts.items())
    share = f" ({100 * outcome.peak_bytes / outcome.plan_bytes - 100:+.1f} %)" if outcome.peak_bytes else ""
    rows = (
        ("parameters", f"{outcome.num_parameters:,} on {outcome.num_gpus} ranks"),
        ("start-up", f"built {outcome.built_s:.1f} s, first step {outcome.first_step_s:.1f} s"),
        ("loss", f"{outcome.loss[0]:.4f} -> {outcome.loss[-1]:.4f} nats in {len(outcome.loss)} steps"),
        ("skipped", f"{outcome.skipped} steps"),
        ("step", f"{1e3 * outcome.median_s:.1f} ms, median of {len(outcome.timed)}"),
        ("rate", f"{outcome.tflops:.3g} TFLOP/s a GPU, {outcome.tokens / outcome.median_s:,.0f} tokens/s"),
        ("memory", f"peak {outcome.peak_bytes / GIB:.2f} GiB, plan {outcome.plan_bytes / GIB:.2f} GiB{share}"),
        ("host memory", f"{outcome.host_gib:.2f} GiB of the largest rank"),
        ("parts, ms", parts),
        ("", f"exposed {outcome.exposed_ms:.1f} · idle {outcome.idle_ms:.1f} · waits {outcome.host_waits}"),
    )
    return "\n".join(f"{name:<13}{text}" for name, text in rows)


def main(argv: list[str]) -> int:
    """Measure what the command line asks for."""
    args = parse_arguments(argv, OPTIONS)
    if "--config" not in args.options:
        raise ConfigError("--config: name a configuration")
    config = load_config([find_config(name) for name in args.options["--config"]], args.overrides).config
    num_steps = count("--steps", args.last("--steps") or str(config.run.steps))
    if "--worker" not in args.options:
        given = args.last("--gpus") or str(torch.cuda.device_count())
        num_gpus = count("--gpus", given)
        validate_for_world(config, num_gpus)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_gpus)]
        return subprocess.run([*launcher, __file__, *argv, "--worker"], check=False).returncode
    with process_context(config.run.device, peer_timeout_s=config.run.peer_timeout_s) as context:
        outcome = train(config, context, num_steps)
        if context.rank != 0:
            return 0
        print(", ".join(f"{name} {version}" for name, version in software_versions().items() if version))
        print(device_name(context.device))
        print(format_outcome(outcome), flush=True)
        if (target := args.last("--json")) is not None:
            report = {
                "date": time.strftime("%Y-%m-%d"),
                "versions": software_versions(),
                "device": device_name(context.device),
                "config": config.model_dump(mode="json"),
                **asdict(outcome),
                "median_s": outcome.median_s,
                "tflops": outcome.tflops,
            }
            Path(target).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_main(main, __doc__, OPTIONS)
