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
from qwen3next_train.kernels.choices import KernelChoice
from qwen3next_train.kernels.gdn_prologue import HeadShape
from qwen3next_train.kernels.selection import KernelSet, reference_kernels
from qwen3next_train.kernels.varlen import VarlenMetadata
from qwen3next_train.log import get_logger
from qwen3next_train.parallel.control import ControlGroup
from qwen3next_train.selftest import mixer_cases
from qwen3next_train.selftest.case import Case, RandomInputs, case_errors
from qwen3next_train.selftest.check import Check, merge_ranks, try_check

BOUND = 1e-2
"""Largest relative error (norm of the difference over the norm of the reference) of an output or a gradient."""

_LENGTHS = (65, 1, 64, 61)
_NUM_TOKENS = sum(_LENGTHS)


@contextmanager
def checks_meanwhile(
    kernels: KernelSet, model: ModelConfig, device: torch.device, dtype: torch.dtype, *, passes_state: bool = False
) -> Iterator[Callable[[], list[Check]]]:
    """:func:`gated_delta_net_checks` in a thread of its own while the block runs, which ends when both are done.

    Most of the time goes to compilers outside python. Where there is nothing to check, no thread is started.

    Args:
        kernels: selected backends.
        model: whose heads are used.
        device: where the model will live.
        dtype: of weights and activations.
        passes_state: as of :func:`gated_delta_net_checks`.

    Yields:
        What waits for the checks and returns them.
    """
    if not _compared(kernels, passes_state=passes_state):
        yield list  # Called, an empty one.
        return

    def run() -> list[Check]:
        # A new thread's current device is the first one.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return gated_delta_net_checks(kernels, model, device, dtype, passes_state=passes_state)

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
    kernels: KernelSet, model: ModelConfig, device: torch.device, dtype: torch.dtype, *, passes_state: bool = False
) -> list[Check]:
    """One check for each operation that has another backend than its reference.

    Args:
        kernels: selected backends; references are taken to be right.
        model: whose heads are used.
        device: where the model will live.
        dtype: of weights and activations.
        passes_state: documents begin with a state and somebody reads the one they leave (context parallelism).
    """
    found = []
    for choice in _compared(kernels, passes_state=passes_state):
        cases = _CASES[choice.operation](model, device, passes_state)
        measure = partial(_check, choice, kernels, cases, dtype)
        found += try_check(f"kernels.{choice.key}", measure)
    return found


def _compared(kernels: KernelSet, *, passes_state: bool) -> list[KernelChoice]:
    operations = _CASES.keys() - (set() if passes_state else {"delta_rule_summary", "delta_state_gradient"})
    return [choice for choice in kernels.choices if choice.operation in operations and choice.backend != "reference"]


def _check(choice: KernelChoice, kernels: KernelSet, cases: Iterator[Case], dtype: torch.dtype) -> list[Check]:
    errors = [case_errors(case, kernels, dtype, references=reference_kernels()) for case in cases]
    error, name = max((error, name) for of_case in errors for name, error in of_case.items())
    detail = f"{choice.operation} by {choice.backend} is off plain torch by {error:.1e} ({name}), allowed {BOUND:.0e}"
    if error > BOUND:
        detail = f"{detail}: it computes wrong results on this machine; set kernels.{choice.key} to reference"
    return [Check(f"kernels.{choice.key}", error <= BOUND, detail)]


def _packings(device: torch.device) -> Iterator[tuple[RandomInputs, VarlenMetadata]]:
    """Several documents and one, each with a generator that begins anew: both get the same values."""
    for lengths in (_LENGTHS, (_NUM_TOKENS,)):
        yield RandomInputs(torch.Generator().manual_seed(0), device), VarlenMetadata.from_lengths(lengths, device)


def _gdn_prologue(model: ModelConfig, device: torch.device, _: bool) -> Iterator[Case]:
    for random, sequences in _packings(device):
        yield mixer_cases.gdn_prologue(random, HeadShape.of(model), sequences, model.linear_conv_kernel_dim)


def _gated_delta_rule(model: ModelConfig, device: torch.device, passes_state: bool) -> Iterator[Case]:
    for random, sequences in _packings(device):
        yield mixer_cases.gated_delta_rule(random, HeadShape.of(model), sequences, with_states=passes_state)


def _delta_rule_summary(model: ModelConfig, device: torch.device, _: bool) -> Iterator[Case]:
    for random, sequences in _packings(device):
        yield mixer_cases.delta_rule_summary(random, HeadShape.of(model), sequences)


def _delta_state_gradient(model: ModelConfig, device: torch.device, _: bool) -> Iterator[Case]:
    for random, sequences in _packings(device):
        yield mixer_cases.delta_state_gradient(random, HeadShape.of(model), sequences)


def _gated_rms_norm(model: ModelConfig, device: torch.device, _: bool) -> Iterator[Case]:
    heads, (random, sequences) = HeadShape.of(model), next(_packings(device))
    shape = sequences.num_tokens, heads.key_heads, heads.group, heads.value_dim
    yield mixer_cases.gated_rms_norm(random, shape, columns=sum(heads.group_sizes), eps=model.rms_norm_eps)


_CASES: dict[str, Callable[[ModelConfig, torch.device, bool], Iterator[Case]]] = {
    "gdn_prologue": _gdn_prologue,
    "gated_delta_rule": _gated_delta_rule,
    "delta_rule_summary": _delta_rule_summary,
    "delta_state_gradient": _delta_state_gradient,
    "gated_rms_norm": _gated_rms_norm,
}
