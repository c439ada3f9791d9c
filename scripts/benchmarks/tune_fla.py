"""Find the fastest configurations of FLA's gated delta rule on this GPU, and time the rule with them.

``python scripts/benchmarks/tune_fla.py FOLDER`` lets Triton try every configuration for the rule as training calls it
(4 x 4096 tokens, heads of the 80B model; minutes with an empty Triton cache) and writes one JSON file a kernel in the
form that FLA reads (``FLA_CONFIG_DIR``). Files meant to be shipped go to ``qwen3next_train/kernels/fla/tuned/sm90/``.
The table printed says how long tuning took, what the rule takes forward and backward, and whether rows as a batch would
be faster than rows as packed documents.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from device_timing import device_name, measure

from qwen3next_train.kernels.varlen import VarlenMetadata

ROWS, LENGTH = 4, 4096
KEY_HEADS, VALUE_HEADS, HEAD_DIM = 16, 32, 128


@dataclass(frozen=True)
class Operands:
    """Inputs of the rule, ``[tokens, heads, dim]``, and the gradient of its output."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    beta: torch.Tensor
    grad: torch.Tensor

    def leaves(self) -> tuple[torch.Tensor, ...]:
        """What gets a gradient."""
        return self.q, self.k, self.v, self.g, self.beta


def operands(device: torch.device) -> Operands:
    """As the layer makes them: normalised q and k, decays from slow to fast, all but g in bf16."""
    torch.manual_seed(0)
    tokens = ROWS * LENGTH

    def unit(heads: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(tokens, heads, HEAD_DIM, device=device), dim=-1).bfloat16()

    rate = torch.logspace(0, -3, VALUE_HEADS, device=device)
    made = Operands(
        q=unit(KEY_HEADS),
        k=unit(KEY_HEADS),
        v=torch.randn(tokens, VALUE_HEADS, HEAD_DIM, device=device).bfloat16(),
        g=-rate * torch.rand(tokens, VALUE_HEADS, device=device),
        beta=torch.rand(tokens, VALUE_HEADS, device=device).bfloat16(),
        grad=torch.randn(tokens, VALUE_HEADS, HEAD_DIM, device=device).bfloat16(),
    )
    for leaf in made.leaves():
        leaf.requires_grad_()
    return made


def main(folder: Path) -> None:
    """Tune, write, and time."""
    # Before FLA is imported, which reads it then: the shipped configurations must not be found instead.
    os.environ["FLA_CACHE_MODE"] = "disabled"
    os.environ["FLA_FLASH_QLA"] = "0"
    from qwen3next_train.kernels.fla.gated_delta_rule import gated_delta_rule_fla

    device = torch.device("cuda")
    inputs = operands(device)
    sequences = VarlenMetadata.from_lengths([LENGTH] * ROWS, device)

    def packed() -> torch.Tensor:
        out, _ = gated_delta_rule_fla(
            inputs.q, inputs.k, inputs.v, g_TN=inputs.g, beta_TN=inputs.beta, sequences=sequences
        )
        return out

    started = time.perf_counter()
    forward_and_backward(packed, inputs)
    torch.cuda.synchronize()
    print(f"{device_name(device)}: tuned in {time.perf_counter() - started:.1f} s")
    tuners = tuned_kernels()
    write(folder, tuners)
    for tuner in tuners:
        # From here on one candidate only: rows as a batch have other keys and would be tuned again.
        tuner.configs = [next(iter(tuner.cache.values()))]
    show("packed documents", packed, inputs, device)
    show("rows as a batch", lambda: batched(inputs), inputs, device)


def batched(inputs: Operands) -> torch.Tensor:
    """The rule of FLA with a batch dimension and no document boundaries."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    q, k, v, g, beta = (leaf.unflatten(0, (ROWS, LENGTH)) for leaf in inputs.leaves())
    out, _ = chunk_gated_delta_rule(q, k, v, g, beta)
    return out.flatten(0, 1)


def forward_and_backward(rule: Callable[[], torch.Tensor], inputs: Operands) -> None:
    """One pass each; gradients are dropped."""
    torch.autograd.grad(rule(), inputs.leaves(), inputs.grad)


def tuned_kernels() -> list[Any]:
    """FLA's tuners that have tried something."""
    from fla.ops.utils.cache import CachedAutotuner

    # isinstance would wake up the lazy proxies of other libraries.
    return sorted((x for x in gc.get_objects() if type(x) is CachedAutotuner and x.cache), key=lambda x: x.kernel_name)


def write(folder: Path, tuners: list[Any]) -> None:
    """One file a kernel; the choice for one direction of the cumulated sums serves both."""
    import triton

    folder.mkdir(parents=True, exist_ok=True)
    for tuner in tuners:
        best = next(iter(tuner.cache.values()))
        config = {
            "kwargs": best.kwargs,
            "num_warps": best.num_warps,
            "num_stages": best.num_stages,
            "num_ctas": best.num_ctas,
            "maxnreg": best.maxnreg,
            "ir_override": None,
        }
        record = {"kernel_name": tuner.kernel_name, "triton_version": triton.__version__, "default_config": config}
        (folder / f"{tuner.kernel_name}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        tried = sorted(median_ms(timing) for timing in tuner.configs_timings.values())
        print(f"{tuner.kernel_name:<48}{config['kwargs']} {best.num_warps} warps {best.num_stages} stages", end="")
        print(f"  best {1e3 * tried[0]:.0f} us, median of {len(tried)} tried {1e3 * tried[len(tried) // 2]:.0f} us")


def median_ms(timing: float | list[float]) -> float:
    """Triton keeps a median, or a median and quantiles."""
    return timing[0] if isinstance(timing, list) else timing


def show(name: str, rule: Callable[[], torch.Tensor], inputs: Operands, device: torch.device) -> None:
    """Print what a form of the rule takes."""
    with torch.no_grad():
        forward = measure(rule, device, iterations=20)
    both = measure(lambda: forward_and_backward(rule, inputs), device, iterations=20)
    print(f"{name:<20}forward {forward.median:.3f} ms, forward and backward {both.median:.3f} ms")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: tune_fla.py FOLDER")
    main(Path(sys.argv[1]))
