"""How long a training step takes on one GPU, and how much of the device's arithmetic it uses.

``python scripts/benchmarks/bench_step.py`` measures the two shipped shapes ``bench_slice4_e512.yaml`` and
``bench_ep8_proxy.yaml``; ``--config`` another one. Of each: forward and backward of one micro-batch (``whole``), the
same without head and loss (``layers``), the whole with what ``parallel.recompute`` can name computed again (``again``
and its parts), and the optimizer step after all micro-batches through the training engine (``step``), which is split
into AdamW and the rest (fp32 accumulation, clipping, weight copies). Each but the second last with rows of one document
(``dense``) and of many (``packed``), with the router's choice (``natural``) and with the same number of rows for every
expert (``balanced``).

Rates are exact model FLOPs (``accounting.flops``; the router's are left out, as others do) over the median time. No
speed is printed while an operation is wrong: every kernel is first compared with its definition, as ``doctor`` does.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from bench_command import run_main
from bench_profile import top_kernels
from bench_shapes import Routing, model_flops, random_batch, random_model
from device_timing import GIB, AdamWTimer, Timing, device_name, measure

from qwen3next_train.accounting.hardware import find_device
from qwen3next_train.cli.arguments import Option, parse_arguments
from qwen3next_train.cli.commands import load
from qwen3next_train.config.schema import Config, RecomputePart
from qwen3next_train.engine.base import Report, StepTotals
from qwen3next_train.errors import ConfigError, TrainError
from qwen3next_train.kernels.choices import format_choices
from qwen3next_train.kernels.selection import DTYPES, KernelSet, select_kernels
from qwen3next_train.model.qwen3_next import LossScales, Qwen3NextForCausalLM
from qwen3next_train.parallel.process_groups import process_context, select_device
from qwen3next_train.parameters import parameter_table
from qwen3next_train.selftest.operations import kernel_checks
from qwen3next_train.topology import Topology
from qwen3next_train.versions import software_versions

SHAPES = ("bench_slice4_e512.yaml", "bench_ep8_proxy.yaml")
OPTIONS = {
    option.name: option
    for option in (
        Option("--config", "FILE", "configuration to measure; default: both shipped shapes"),
        Option("--iters", "N", "timed runs of each measurement (default 10)"),
        Option("--only", "WORDS", "measure those whose name (dense/natural/whole) has all these words: dense,layers"),
        Option("--profile", "", "print the ten kernels that take longest in each whole micro-batch"),
        Option("--json", "FILE", "write everything as JSON too"),
    )
}


@dataclass(frozen=True)
class Case:
    """One thing to measure."""

    rows: str
    routing: str
    part: str
    recompute: tuple[RecomputePart, ...] = ()

    @property
    def name(self) -> str:
        """As ``--only`` matches it."""
        return "/".join([self.rows, self.routing, self.part, *self.recompute])


_PARTS: tuple[RecomputePart, ...] = tuple(part for part in get_args(RecomputePart) if part != "layer")
_RECOMPUTED: tuple[tuple[RecomputePart, ...], ...] = (*((part,) for part in _PARTS), _PARTS, ("layer",))
"""Each part, all parts, whole layers."""


def _each_form(part: str) -> list[Case]:
    return [Case(rows, routing, part) for rows in ("dense", "packed") for routing in ("natural", "balanced")]


CASES = (
    *_each_form("whole"),
    *_each_form("layers"),
    *(Case("dense", "natural", "again", parts) for parts in _RECOMPUTED),
    *_each_form("step"),
)


@dataclass(frozen=True)
class Outcome:
    """What came of a case.

    Args:
        case: what was measured.
        num_tokens: tokens it processed.
        flops: model FLOPs it took.
        timing: None when it did not fit into the device's memory.
        note: one line: what the time consists of.
        kernels: the longest kernels, one line each, when asked for.
    """

    case: Case
    num_tokens: int
    flops: int
    timing: Timing | None
    note: str = ""
    kernels: list[str] = field(default_factory=list)


class Bench:
    """Measurements of one configuration on one device.

    Args:
        config: the resolved configuration.
        device: where to measure.
        iterations: timed runs of each measurement.
        with_profile: also list the longest kernels of a whole micro-batch.
    """

    def __init__(self, config: Config, device: torch.device, *, iterations: int, with_profile: bool) -> None:
        self.config, self.device = config, device
        self.iterations, self.with_profile = iterations, with_profile
        kernels = select_kernels(config.kernels, device, dtype=DTYPES[config.run.precision], model=config.model)
        self.routing = Routing(kernels.token_permutation)
        self.kernels: KernelSet = replace(kernels, token_permutation=self.routing)
        self.medians: dict[Case, float] = {}

    def wrong_operations(self) -> list[str]:
        """One line per operation whose results are wrong."""
        checks = kernel_checks(self.kernels, self.config.model, self.device, DTYPES[self.config.run.precision])
        return [check.line() for check in checks if not check.ok]

    def run(self, cases: Sequence[Case]) -> Iterator[Outcome]:
        """Measure the cases in order: the model alone first, then what needs the engine and its memory."""
        alone = [case for case in cases if case.part != "step"]
        if alone:
            model = random_model(self.config, self.kernels, self.device)
            for case in alone:
                yield self._guarded(case, lambda case=case: self._alone(case, model))
            del model
        _free(self.device)
        steps = [case for case in cases if case.part == "step"]
        if steps:
            with process_context(self.config.run.device):
                yield from self._with_engine(steps)

    def _with_engine(self, cases: Sequence[Case]) -> Iterator[Outcome]:
        from qwen3next_train.engine.zero_engine import ZeroEngine

        run = self.config.run
        try:
            engine = ZeroEngine(
                self.config,
                topology=Topology(),
                kernels=self.kernels,
                device=self.device,
                num_micro_batches=run.global_batch_size // run.micro_batch_size,
            )
        except torch.OutOfMemoryError:
            yield from (Outcome(case, 0, 0, None) for case in cases)
            return
        for case in cases:
            yield self._guarded(case, lambda case=case: self._step(case, engine.train_step))

    def _guarded(self, case: Case, work: Callable[[], Outcome]) -> Outcome:
        self.routing.balanced = case.routing == "balanced"
        try:
            return work()
        except torch.OutOfMemoryError:
            return Outcome(case, 0, 0, None)
        finally:
            _free(self.device)

    def _alone(self, case: Case, model: Qwen3NextForCausalLM) -> Outcome:
        """Forward and backward of one micro-batch; gradients are written, not accumulated."""
        model.recompute = case.recompute
        batch = random_batch(self.config, packed=case.rows == "packed").to(self.device)
        scales = LossScales([float(count) for count in batch.num_targets], num_micro_batches=1)

        def whole() -> None:
            model.zero_grad(set_to_none=True)
            model.begin_step()
            model([batch], scales)[0].total.backward()

        upstream_TD: list[torch.Tensor] = []

        def layers() -> None:
            model.zero_grad(set_to_none=True)
            hidden_TD = model.forward_hidden(batch)
            if not upstream_TD:
                upstream_TD.append(torch.randn_like(hidden_TD))
            hidden_TD.backward(upstream_TD[0])

        work = layers if case.part == "layers" else whole
        timing = measure(work, self.device, iterations=self.iterations)
        self.medians[case] = timing.median
        kernels = top_kernels(work, self.device) if self.with_profile and case.part == "whole" else []
        model.zero_grad(set_to_none=True)
        flops = model_flops(self.config, batch, layers_only=case.part == "layers")
        note = f"first run {timing.first_s:.1f} s"
        if case.recompute:
            note = f"{note}, recompute {'+'.join(case.recompute)}"
        return Outcome(case, batch.num_tokens, flops, timing, note, kernels)

    def _step(self, case: Case, train_step: Callable[..., object]) -> Outcome:
        """All micro-batches of an optimizer step and the update."""
        run = self.config.run
        batches = [
            random_batch(self.config, packed=case.rows == "packed", seed=seed)
            for seed in range(run.global_batch_size // run.micro_batch_size)
        ]
        totals = StepTotals.over_ranks(batches, list)

        def work() -> None:
            train_step(batches, totals=totals, lr=self.config.optimizer.lr, report=Report.NONE)

        with AdamWTimer(self.device).listening() as adamw:
            timing = measure(work, self.device, iterations=max(self.iterations // 3, 1), warmup=1)
            adamw.clear()
            work()
            note = f"{len(batches)} micro-batches; AdamW {_after(adamw, self.device):.1f} ms"
        micro_batch = self.medians.get(replace(case, part="whole"))
        if micro_batch is not None:
            rest = timing.median - len(batches) * micro_batch - adamw.total_ms()
            note = f"{note}, accumulation, clipping and weight copies {rest:.1f} ms"
        flops = sum(model_flops(self.config, batch) for batch in batches)
        return Outcome(case, totals.num_tokens, flops, timing, note)


def format_outcome(outcome: Outcome, peak_flops: float | None) -> str:
    """One line of the table, more with the longest kernels."""
    name = f"{outcome.case.rows:<7}{outcome.case.routing:<9}{outcome.case.part:<7}"
    if outcome.timing is None:
        return f"{name}out of memory"
    times = outcome.timing
    rate = outcome.flops / times.median * 1e3
    share = f"{100 * rate / peak_flops:5.1f}" if peak_flops else "    -"
    line = (
        f"{name}{times.median:9.2f}{min(times.ms):9.2f}{max(times.ms):9.2f}"
        f"{outcome.num_tokens / times.median * 1e3:11,.0f}{rate / 1e12:8.1f}{share:>7}"
        f"{times.peak_bytes / GIB:8.1f}  {outcome.note}"
    )
    return "\n".join([line, *outcome.kernels])


HEADER = (
    f"{'rows':<7}{'routing':<9}{'part':<7}{'median ms':>9}{'min':>9}{'max':>9}"
    f"{'tokens/s':>11}{'TFLOP/s':>8}{'% peak':>7}{'GiB':>8}  note"
)


def bench(config: Config, name: str, words: Sequence[str], *, iterations: int, with_profile: bool) -> dict[str, object]:
    """Measure and print one configuration; the result is what ``--json`` writes of it.

    Raises:
        TrainError: an operation is wrong.
    """
    device = select_device(config.run.device, 0)
    peak = find_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    peak_flops = None if peak is None else peak.peak_flops(config.run.precision)
    runner = Bench(config, device, iterations=iterations, with_profile=with_profile)
    batch = random_batch(config, packed=False)
    rows, length = config.run.micro_batch_size, config.data.sequence_length
    parameters = sum(spec.numel for spec in parameter_table(config.model))
    print(f"\n{name} on {device_name(device)}: {parameters / 1e9:.2f} B parameters, {rows} x {length} tokens,", end=" ")
    print(f"{config.run.precision}, {model_flops(config, batch) / 1e12:.1f} TFLOP a micro-batch of one document a row")
    print(format_choices(runner.kernels.choices), flush=True)
    wrong = runner.wrong_operations()
    if wrong:
        raise TrainError(f"{name}: no speed of wrong results:\n" + "\n".join(wrong))
    print(HEADER, flush=True)
    outcomes = []
    for outcome in runner.run([case for case in CASES if all(word in case.name for word in words)]):
        print(format_outcome(outcome, peak_flops), flush=True)
        outcomes.append(asdict(outcome))
    return {"config": name, "device": device_name(device), "outcomes": outcomes}


def main(argv: list[str]) -> int:
    """Measure what the command line asks for."""
    args = parse_arguments(argv, OPTIONS)
    iterations = int(args.last("--iters") or 10)
    if iterations < 1:
        raise ConfigError("--iters: give a whole number > 0")
    only = (args.last("--only") or "").replace("/", ",").split(",")
    target = args.last("--json")
    if "--config" not in args.options:
        results = _each_shape_by_itself(argv)
    else:
        files = list(args.options["--config"])
        print(", ".join(f"{name} {version}" for name, version in software_versions().items() if version))
        wanted = [word for word in only if word]
        name = "+".join(Path(file).stem for file in files)
        profile = "--profile" in args.options
        results = [bench(load(args).config, name, wanted, iterations=iterations, with_profile=profile)]
    if target is not None:
        report = {"date": time.strftime("%Y-%m-%d"), "versions": software_versions(), "results": results}
        Path(target).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def _each_shape_by_itself(argv: Sequence[str]) -> list[dict[str, Any]]:
    """Results of the shipped shapes, each from a process of its own: what one leaves on the device is gone."""
    results = []
    for name in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.json"
            command = [sys.executable, __file__, "--config", name, *argv, "--json", str(report)]
            if subprocess.run(command, check=False).returncode != 0:
                raise TrainError(f"{name}: not measured, see above")
            results += json.loads(report.read_text(encoding="utf-8"))["results"]
    return results


def _after(adamw: AdamWTimer, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return adamw.total_ms()


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    run_main(main, __doc__, OPTIONS)
