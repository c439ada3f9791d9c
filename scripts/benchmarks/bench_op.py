"""Each operation of the model by itself on one GPU: is it right, how long does it take, how long must it take?

``python scripts/benchmarks/bench_op.py`` compares the backends that ``kernels.*`` selects with the references: the
largest relative error of outputs and gradients (bf16 on both sides), and the times of both. ``limit`` is the time that
the operation's matrix products and its traffic cannot go below, whichever is longer, at the rates this device was
measured to have for a large bf16 product and a large copy.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from device_timing import device_name, measure
from op_case import Inputs, OpCase, Outputs, Work
from op_cases_delta_net import delta_net_cases
from op_cases_dense import dense_cases
from op_cases_moe import moe_cases

from qwen3next_train.cli.arguments import Option, parse_arguments
from qwen3next_train.config.load import load_config
from qwen3next_train.config.schema import KernelsConfig
from qwen3next_train.errors import ConfigError, TrainError
from qwen3next_train.kernels.selection import KernelSet, format_choices, select_kernels
from qwen3next_train.selftest.operations import relative_error
from qwen3next_train.versions import software_versions

OPTIONS = {
    option.name: option
    for option in (
        Option("--iters", "N", "timed runs of each measurement (default 20)"),
        Option("--only", "TEXT", "operations whose name contains this"),
        Option("--json", "FILE", "write the table as JSON too"),
    )
}
ERROR_BOUND = 2e-2


@dataclass(frozen=True)
class Rates:
    """What the device was measured to reach.

    Args:
        flops: FLOP/s of a bf16 product of 8192 x 8192 matrices.
        bytes_per_s: read and written by a copy of 1 GiB.
    """

    flops: float
    bytes_per_s: float

    def limit_ms(self, work: Work) -> float:
        """Milliseconds that the work takes at least."""
        return 1e3 * max(work.flops / self.flops, work.num_bytes / self.bytes_per_s)


@dataclass(frozen=True)
class Row:
    """One line of the table; times in milliseconds."""

    name: str
    error: float | None
    worst: str
    forward_ms: float
    forward_limit_ms: float
    both_ms: float
    both_limit_ms: float
    reference_both_ms: float | None

    def line(self) -> str:
        """As printed."""
        error = "      -" if self.error is None else f"{self.error:7.0e}"
        reference = "        -" if self.reference_both_ms is None else f"{self.reference_both_ms:9.3f}"
        wrong = "" if self.error is None or self.error <= ERROR_BOUND else "  WRONG"
        return (
            f"{self.name:<34}{error} {self.worst:<16}"
            f"{self.forward_ms:9.3f}{self.forward_limit_ms:9.3f}{100 * self.forward_limit_ms / self.forward_ms:6.0f}%"
            f"{self.both_ms:9.3f}{self.both_limit_ms:9.3f}{100 * self.both_limit_ms / self.both_ms:6.0f}%"
            f"{reference}{wrong}"
        )


HEADER = (
    f"{'operation':<34}{'error':>7} {'worst at':<16}{'forward':>9}{'limit':>9}{'':>7}{'fwd+bwd':>9}{'limit':>9}{'':>7}"
    f"{'reference':>9}"
)


def measure_rates(device: torch.device, size: int = 8192) -> Rates:
    """Measure product and copy."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product_ms = measure(lambda: left @ right, device, iterations=10).median
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_ms = measure(lambda: target.copy_(source), device, iterations=10).median
    return Rates(2 * size**3 / product_ms * 1e3, 2 * source.numel() / copy_ms * 1e3)


def measure_case(
    case: OpCase, kernels: KernelSet, references: KernelSet, device: torch.device, rates: Rates, iterations: int
) -> Row:
    """Compare and time one operation."""
    torch.manual_seed(0)
    inputs = _leaves(case.inputs(device))
    outputs = case.run(kernels, inputs)
    upstream = tuple(torch.randn_like(output) for output in outputs if output.requires_grad)
    del outputs
    with torch.no_grad():
        forward = measure(partial(case.run, kernels, inputs), device, iterations=iterations)
    both = measure(partial(_both, case, kernels, inputs, upstream), device, iterations=iterations)
    error, worst, reference_ms = _compare(case, kernels, references, inputs, upstream, device)
    limit_ms = rates.limit_ms(case.forward)
    return Row(
        case.name,
        error,
        worst,
        forward.median,
        limit_ms,
        both.median,
        limit_ms + rates.limit_ms(case.backward),
        reference_ms,
    )


def _compare(
    case: OpCase,
    kernels: KernelSet,
    references: KernelSet,
    inputs: Inputs,
    upstream: Outputs,
    device: torch.device,
) -> tuple[float | None, str, float | None]:
    """Largest error, where it is, and the reference's time; None where the reference does not fit."""
    try:
        expected = _results(case, references, inputs, upstream)
        found = _results(case, kernels, inputs, upstream)
        errors = {name: relative_error(found[name], expected[name]) for name in expected}
        del found, expected
        timing = measure(partial(_both, case, references, inputs, upstream), device, iterations=3, warmup=0)
    except torch.OutOfMemoryError:
        return None, "", None
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst, timing.median


def _results(case: OpCase, kernels: KernelSet, inputs: Inputs, upstream: Outputs) -> dict[str, torch.Tensor]:
    outputs = _both(case, kernels, inputs, upstream)
    results = {f"output {index}": output.detach() for index, output in enumerate(outputs, start=1)}
    for name, leaf in inputs.items():
        if leaf.grad is not None:
            results[f"grad {name}"] = leaf.grad.clone()
    return results


def _both(case: OpCase, kernels: KernelSet, inputs: Inputs, upstream: Outputs) -> Outputs:
    """Forward and backward with fresh gradients."""
    for leaf in inputs.values():
        leaf.grad = None
    outputs = case.run(kernels, inputs)
    torch.autograd.backward([output for output in outputs if output.requires_grad], upstream)
    return outputs


def _leaves(inputs: Inputs) -> Inputs:
    return {name: x.requires_grad_() if x.is_floating_point() else x for name, x in inputs.items()}


def _all_cases() -> Iterator[OpCase]:
    yield from moe_cases()
    yield from delta_net_cases()
    yield from dense_cases()


def main(argv: list[str]) -> int:
    """Measure what the command line asks for; 1 when an operation is wrong."""
    args = parse_arguments(argv, OPTIONS)
    if not torch.cuda.is_available():
        raise ConfigError("run.device: cuda is not available on this machine; operations are measured on a GPU")
    device = torch.device("cuda", 0)
    config = load_config([], args.overrides).config
    kernels = select_kernels(config.kernels, device, model=config.model)
    references = select_kernels(
        KernelsConfig.model_validate(dict.fromkeys(KernelsConfig.model_fields, "reference")), device
    )
    rates = measure_rates(device)
    print(", ".join(f"{name} {version}" for name, version in software_versions().items() if version))
    print(f"{device_name(device)}: {rates.flops / 1e12:.0f} TFLOP/s, {rates.bytes_per_s / 1e12:.2f} TB/s")
    print(f"{format_choices(kernels.choices)}\n{HEADER}", flush=True)
    rows = []
    for case in _all_cases():
        if (args.last("--only") or "") in case.name:
            rows.append(measure_case(case, kernels, references, device, rates, int(args.last("--iters") or 20)))
            print(rows[-1].line(), flush=True)
            torch.cuda.empty_cache()
    target = args.last("--json")
    if target is not None:
        report = {"versions": software_versions(), "rates": asdict(rates), "rows": [asdict(row) for row in rows]}
        Path(target).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return int(any(row.error is not None and row.error > ERROR_BOUND for row in rows))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except TrainError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
