"""Gated DeltaNet's operations at the start of training on a GPU: each once against plain torch.

Compilers have given the delta rule wrong gradients without a word (:mod:`qwen3next_train.selftest.operations`), and
the next one may; a run should not find out by its loss. The heads are the model's own, all of them, so that what is
compiled here is what training runs, and Triton's cache is warm when the first step comes. Compiling takes as long as
building the model, so both happen at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial

import torch

from qwen3next_train.config.schema import ModelConfig
from qwen3next_train.errors import KernelUnavailable
from qwen3next_train.kernels.gated_delta_rule import gated_delta_rule_reference
from qwen3next_train.kernels.gdn_prologue import HeadShape, gdn_prologue_reference
from qwen3next_train.kernels.norms import GatedRmsNorm, gated_rms_norm_reference
from qwen3next_train.kernels.selection import KernelChoice, KernelSet
from qwen3next_train.kernels.varlen import VarlenMetadata
from qwen3next_train.log import get_logger
from qwen3next_train.parallel.control import ControlGroup
from qwen3next_train.selftest.case import Case, Outputs, RandomInputs
from qwen3next_train.selftest.check import Check, merge_ranks, try_check
from qwen3next_train.selftest.mixer_cases import delta_rule_tensors, first_output, projection_tensors
from qwen3next_train.selftest.operations import case_errors

BOUND = 1e-2
"""Largest relative error (norm of the difference over the norm of the reference) of an output or a gradient."""

_LENGTHS = (65, 1, 64, 61)
_NUM_TOKENS = sum(_LENGTHS)


@contextmanager
def checks_meanwhile(
    kernels: KernelSet, model: ModelConfig, device: torch.device, dtype: torch.dtype
) -> Iterator[Callable[[], list[Check]]]:
    """:func:`gated_delta_net_checks` in a thread of its own while the block runs, which ends when both are done.

    Most of the time goes to compilers outside python. Where there is nothing to check, no thread is started.

    Args:
        kernels: selected backends.
        model: whose heads are used.
        device: where the model will live.
        dtype: of weights and activations.

    Yields:
        What waits for the checks and returns them.
    """
    if not _compared(kernels):
        yield list  # Called, an empty one.
        return

    def run() -> list[Check]:
        # A new thread's current device is the first one.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return gated_delta_net_checks(kernels, model, device, dtype)

    with ThreadPoolExecutor(1) as pool:
        checks = pool.submit(run)
        try:
            yield checks.result
        except Exception:
            # A kernel that faults spoils the device for everything else: then the block's error is not the cause.
            if checks.exception() is None:
                for check in checks.result():
                    if not check.ok:
                        get_logger().error("%s: %s", check.check, check.detail)
            raise


def reject_wrong_gated_delta_net(checks: Sequence[Check], control: ControlGroup) -> None:
    """Let no rank train when an operation of Gated DeltaNet is wrong on any of them.

    Args:
        checks: what this rank found.
        control: the ranks.

    Raises:
        KernelUnavailable: the same on every rank.
    """
    by_rank = control.gather_json([asdict(check) for check in checks])
    for check in merge_ranks([[Check(**one) for one in of_rank] for of_rank in by_rank]):
        if not check.ok:
            raise KernelUnavailable(f"{check.check}: {check.detail}")


def gated_delta_net_checks(
    kernels: KernelSet, model: ModelConfig, device: torch.device, dtype: torch.dtype
) -> list[Check]:
    """One check for each operation that has another backend than its reference.

    Args:
        kernels: selected backends; references are taken to be right.
        model: whose heads are used.
        device: where the model will live.
        dtype: of weights and activations.
    """
    found = []
    for choice in _compared(kernels):
        measure = partial(_check, choice, kernels, model, device, dtype)
        found += try_check(f"kernels.{choice.key}", measure)
    return found


def _compared(kernels: KernelSet) -> list[KernelChoice]:
    return [choice for choice in kernels.choices if choice.operation in _CASES and choice.backend != "reference"]


def _check(
    choice: KernelChoice, kernels: KernelSet, model: ModelConfig, device: torch.device, dtype: torch.dtype
) -> list[Check]:
    random = RandomInputs(torch.Generator().manual_seed(0), device)
    cases = _CASES[choice.operation](kernels, model, random)
    error, name = max((error, name) for case in cases for name, error in case_errors(case, dtype).items())
    detail = f"{choice.operation} by {choice.backend} is off plain torch by {error:.1e} ({name}), allowed {BOUND:.0e}"
    if error > BOUND:
        detail = f"{detail}: it computes wrong results on this machine; set kernels.{choice.key} to reference"
    return [Check(f"kernels.{choice.key}", error <= BOUND, detail)]


def _packings(device: torch.device) -> Iterator[VarlenMetadata]:
    for lengths in (_LENGTHS, (_NUM_TOKENS,)):
        yield VarlenMetadata.from_lengths(lengths, device)


def _gdn_prologue(kernels: KernelSet, model: ModelConfig, random: RandomInputs) -> Iterator[Case]:
    heads = HeadShape.of(model)
    inputs = projection_tensors(random, heads, _NUM_TOKENS, model.linear_conv_kernel_dim)
    for sequences in _packings(random.device):
        kernel = partial(kernels.gdn_prologue, heads=heads, sequences=sequences)
        reference = partial(gdn_prologue_reference, heads=heads, sequences=sequences)
        yield Case(inputs, kernel, reference, frozenset({"A_log_N", "dt_bias_N"}))


def _gated_delta_rule(kernels: KernelSet, model: ModelConfig, random: RandomInputs) -> Iterator[Case]:
    """As in training: documents begin empty, and nobody reads their final states."""
    heads = HeadShape.of(model)
    decay = frozenset({"g_TN"})
    inputs = delta_rule_tensors(random, heads, _NUM_TOKENS)
    for sequences in _packings(random.device):
        kernel = partial(kernels.gated_delta_rule, sequences=sequences)
        reference = partial(gated_delta_rule_reference, sequences=sequences)
        yield Case(inputs, partial(first_output, kernel), partial(first_output, reference), decay, decay)


def _gated_rms_norm(kernels: KernelSet, model: ModelConfig, random: RandomInputs) -> Iterator[Case]:
    """The gate where the layer's projection has it, beside other columns."""
    heads = HeadShape.of(model)
    shape = (_NUM_TOKENS, heads.key_heads, heads.group, heads.value_dim)
    inputs = {
        "x": random.normal(*shape),
        "projection": random.normal(_NUM_TOKENS, heads.key_heads, sum(heads.group_sizes)),
        "weight": 1 + random.normal(heads.value_dim) / 4,
    }

    def outputs(norm: GatedRmsNorm, x: torch.Tensor, projection: torch.Tensor, weight: torch.Tensor) -> Outputs:
        gate = projection[..., -heads.group_sizes[-1] :].unflatten(-1, shape[2:])
        return (norm(x, gate, weight, eps=model.rms_norm_eps),)

    yield Case(inputs, partial(outputs, kernels.gated_rms_norm), partial(outputs, gated_rms_norm_reference))


_CASES: dict[str, Callable[[KernelSet, ModelConfig, RandomInputs], Iterator[Case]]] = {
    "gdn_prologue": _gdn_prologue,
    "gated_delta_rule": _gated_delta_rule,
    "gated_rms_norm": _gated_rms_norm,
}
