"""Each operation of the model by itself on one GPU: is it right, how long does it take, how long must it take?

``python scripts/benchmarks/bench_op.py`` compares the backends that ``kernels.*`` selects with the references: the
largest relative error of outputs and gradients (bf16 on both sides), and the times of both. ``limit`` is the time that
the operation's matrix products and its traffic cannot go below, whichever is longer, at the rates this device was
measured to have for a large bf16 product and a large copy. Sizes are the model section's, the 80B model's unless
overridden, for one micro-batch of 4 x 4096 tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from bench_command import run_main
from device_timing import device_name, measure
from op_cases import OpCase, Work, op_cases

from qwen3next_train.cli.arguments import Option, parse_arguments
from qwen3next_train.config.load import load_config
from qwen3next_train.errors import ConfigError
from qwen3next_train.kernels.choices import format_choices
from qwen3next_train.kernels.selection import KernelSet, reference_kernels, select_kernels
from qwen3next_train.selftest.case import Inputs, Outputs, RandomInputs, compare
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
    """Compare and time one operation, in bf16 but for what the model keeps in fp32."""
    # Not the case's own inputs: in fp64 they would take four times the room.
    built = case.build(RandomInputs(torch.Generator(device).manual_seed(0), device))
    differentiable = built.differentiable
    inputs = {name: value.requires_grad_(differentiable) for name, value in built.rounded(torch.bfloat16).items()}
    kernel, reference = partial(built.run, kernels, **inputs), partial(built.run, references, **inputs)
    del built
    # Of what nobody differentiates there is no backward pass.
    upstream = tuple(torch.randn_like(output) for output in kernel()) if differentiable else ()
    with torch.no_grad():
        forward = measure(kernel, device, iterations=iterations)
    both = measure(partial(_both, kernel, inputs, upstream), device, iterations=iterations)
    error, worst, reference_ms = _compare(kernel, reference, inputs, upstream, device)
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
    kernel: Callable[..., Outputs],
    reference: Callable[..., Outputs],
    inputs: Inputs,
    upstream: Outputs,
    device: torch.device,
) -> tuple[float | None, str, float | None]:
    """Largest error, where it is, and the reference's time; None where the reference does not fit."""
    for leaf in inputs.values():
        leaf.grad = None
    try:
        errors = compare(
            kernel,
            reference,
            inputs,
            reference_dtype=None,
            generator=torch.Generator(device).manual_seed(1),
            differentiable=bool(upstream),
        )
        timing = measure(partial(_both, reference, inputs, upstream), device, iterations=3, warmup=0)
    except torch.OutOfMemoryError:
        return None, "", None
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst, timing.median


def _both(operation: Callable[[], Outputs], inputs: Inputs, upstream: Outputs) -> None:
    """Forward and, where there are gradients of the outputs, backward with fresh gradients."""
    for leaf in inputs.values():
        leaf.grad = None
    outputs = operation()
    if upstream:
        torch.autograd.backward(outputs, upstream)


def main(argv: list[str]) -> int:
    """Measure what the command line asks for; 1 when an operation is wrong."""
    args = parse_arguments(argv, OPTIONS)
    if not torch.cuda.is_available():
        raise ConfigError("run.device: cuda is not available on this machine; operations are measured on a GPU")
    device = torch.device("cuda", 0)
    config = load_config([], args.overrides).config
    kernels = select_kernels(config.kernels, device, model=config.model)
    rates = measure_rates(device)
    print(", ".join(f"{name} {version}" for name, version in software_versions().items() if version))
    print(f"{device_name(device)}: {rates.flops / 1e12:.0f} TFLOP/s, {rates.bytes_per_s / 1e12:.2f} TB/s")
    print(f"{format_choices(kernels.choices)}\n{HEADER}", flush=True)
    rows = []
    for case in op_cases(config.model):
        if (args.last("--only") or "") in case.name:
            iterations = int(args.last("--iters") or 20)
            rows.append(measure_case(case, kernels, reference_kernels(), device, rates, iterations))
            print(rows[-1].line(), flush=True)
            torch.cuda.empty_cache()
    target = args.last("--json")
    if target is not None:
        report = {"versions": software_versions(), "rates": asdict(rates), "rows": [asdict(row) for row in rows]}
        Path(target).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return int(any(row.error is not None and row.error > ERROR_BOUND for row in rows))


if __name__ == "__main__":
    run_main(main, __doc__, OPTIONS)
