"""Each operation's selected backend against its definition, written out in fp64: outputs and every gradient.

A wrong kernel trains without a complaint and to a worse model: Triton 3.4 to 3.7.0 on Hopper gave the gated delta
rule wrong gradients of k (flash-linear-attention issue 640). Inputs are small, but have the head sizes of the model
that will be trained, documents whose lengths fit no tile, and decays slow enough for states to reach far.

Letters: those of the operations' packages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F

from qwen3next_train.config.schema import ModelConfig
from qwen3next_train.kernels.cross_entropy import IGNORE_INDEX
from qwen3next_train.kernels.selection import KernelChoice, KernelSet
from qwen3next_train.selftest.case import CANCELLATION, EPS, NUM_TOKENS, Case, Outputs, RandomInputs, capped
from qwen3next_train.selftest.check import Check, try_check
from qwen3next_train.selftest.mixer_cases import MIXER_CASES
from qwen3next_train.selftest.moe_cases import MOE_CASES

BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Largest relative error (norm of the difference over the norm of the reference) of an output or a gradient."""

DTYPE_NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16"}


def kernel_checks(kernels: KernelSet, model: ModelConfig, device: torch.device, dtype: torch.dtype) -> list[Check]:
    """One check per operation.

    Args:
        kernels: selected backends.
        model: whose head sizes are used.
        device: where the model will live.
        dtype: of weights and activations.
    """

    def check_of(choice: KernelChoice) -> list[Check]:
        return try_check(f"kernel {choice.operation}", lambda: [_kernel_check(choice, kernels, model, device, dtype)])

    return [check for choice in kernels.choices for check in check_of(choice)]


def kernel_errors(
    operation: str, kernels: KernelSet, model: ModelConfig, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Relative error of every output and gradient of an operation, the largest over packed and dense inputs.

    Args:
        operation: field of ``KernelSet``.
        kernels: selected backends.
        model: whose head sizes are used.
        device: where to run.
        dtype: of the inputs; the reference gets the same rounded values.

    Returns:
        ``output``, ``output 2`` for a second one, and ``grad NAME`` for each input; infinite where not finite.
    """
    worst: dict[str, float] = {}
    generator = torch.Generator().manual_seed(0)
    for case in _CASES[operation](kernels, model, RandomInputs(generator, device)):
        for name, error in case_errors(case, dtype).items():
            worst[name] = max(worst.get(name, 0.0), error)
    return worst


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference (over 1 where that is 0); infinite if not finite."""
    norm = float(torch.linalg.vector_norm(reference.double()))
    difference = float(torch.linalg.vector_norm(value.double() - reference.double()))
    error = difference / norm if norm > 0 else difference
    return error if error < float("inf") else float("inf")


def _kernel_check(
    choice: KernelChoice, kernels: KernelSet, model: ModelConfig, device: torch.device, dtype: torch.dtype
) -> Check:
    # A reference also takes fp64, where nothing but a mistake can make a difference.
    dtypes = (dtype, torch.float64) if choice.backend == "reference" else (dtype,)
    ok, parts = True, []
    for precision in dtypes:
        errors = kernel_errors(choice.operation, kernels, model, device, precision)
        name, error = max(errors.items(), key=lambda item: item[1])
        ok = ok and error <= BOUNDS[precision]
        parts.append(f"{DTYPE_NAMES[precision]} {error:.1e} ({name}), allowed {BOUNDS[precision]:.0e}")
    detail = f"{choice.backend} ({choice.reason}); largest error: {'; '.join(parts)}"
    if not ok:
        hint = f"set kernels.{choice.key} to reference"
        if choice.backend == "reference":
            hint = "do not train with this build of torch on this machine, and report it"
        detail = f"{detail}: wrong results; {hint}"
    return Check(f"kernel {choice.operation}", ok, detail)


def case_errors(case: Case, dtype: torch.dtype) -> dict[str, float]:
    """Relative error of every output and gradient of one case, named as :func:`kernel_errors` names them.

    In bf16 those of cancelling gradients are divided by :data:`CANCELLATION`.
    """
    narrow, exact = {}, {}
    for name, value in case.inputs.items():
        rounded = value.to(torch.promote_types(dtype, torch.float32) if name in case.fp32_inputs else dtype)
        narrow[name] = rounded.clone().requires_grad_()
        exact[name] = rounded.to(torch.float64, copy=True).requires_grad_()
    outputs = case.kernel(**narrow)
    generator = torch.Generator().manual_seed(1)
    upstream = [
        torch.randn(output.shape, dtype=torch.float64, generator=generator).to(output.device, output.dtype)
        for output in outputs
    ]
    torch.autograd.backward(outputs, upstream)
    on_cpu = all(value.device.type == "cpu" for value in case.inputs.values())
    with _one_thread() if on_cpu else nullcontext():
        references = case.reference(**exact)
        torch.autograd.backward(references, [gradient.double() for gradient in upstream])
    errors = {}
    for index, (output, reference) in enumerate(zip(outputs, references, strict=True)):
        errors["output" if index == 0 else f"output {index + 1}"] = relative_error(output.detach(), reference.detach())
    for name, leaf in narrow.items():
        gradient, reference_gradient = leaf.grad, exact[name].grad
        assert gradient is not None, name
        assert reference_gradient is not None, name
        cancels = name in case.cancelling and dtype == torch.bfloat16
        errors[f"grad {name}"] = relative_error(gradient, reference_gradient) / (CANCELLATION if cancels else 1)
    return errors


@contextmanager
def _one_thread() -> Iterator[None]:
    """For thousands of tiny operations on the CPU, whose threads would spend their time waiting for each other.

    Threads that first meet torch inside, anywhere in the process, get the one too and keep it.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _rms_norm(kernels: KernelSet, model: ModelConfig, random: RandomInputs) -> Iterator[Case]:
    size = capped(model.hidden_size)
    inputs = {
        "x_TD": random.normal(NUM_TOKENS, size),
        "y_TD": random.normal(NUM_TOKENS, size),
        "weight_D": random.normal(size) / 4,
    }

    def kernel(x_TD: torch.Tensor, y_TD: torch.Tensor, weight_D: torch.Tensor) -> Outputs:
        alone_TD = kernels.rms_norm.normalize(x_TD, weight_D, eps=EPS)
        return alone_TD, *kernels.rms_norm.fused_add_rms_norm(x_TD, y_TD, weight_D, eps=EPS)

    def reference(x_TD: torch.Tensor, y_TD: torch.Tensor, weight_D: torch.Tensor) -> Outputs:
        alone_TD, normed_TD = (z / (z.square().mean(1, keepdim=True) + EPS).sqrt() for z in (x_TD, x_TD + y_TD))
        return alone_TD * (1 + weight_D), x_TD + y_TD, normed_TD * (1 + weight_D)

    yield Case(inputs, kernel, reference)

    def reference_pass(x_TD: torch.Tensor, weight_D: torch.Tensor) -> Outputs:
        return 1 * x_TD, x_TD / (x_TD.square().mean(1, keepdim=True) + EPS).sqrt() * (1 + weight_D)

    del inputs["y_TD"]
    yield Case(inputs, partial(kernels.rms_norm.rms_norm_with_residual, eps=EPS), reference_pass)


def _linear_cross_entropy(kernels: KernelSet, model: ModelConfig, random: RandomInputs) -> Iterator[Case]:
    # Large enough for the reference to need several chunks on CPU.
    hidden, vocabulary = 16, 32768
    inputs = {"hidden_TD": random.normal(NUM_TOKENS, hidden), "weight_VD": random.normal(vocabulary, hidden)}
    labels_T = (random.uniform(NUM_TOKENS) * vocabulary).long()
    labels_T[::5] = IGNORE_INDEX

    def kernel(**inputs: torch.Tensor) -> Outputs:
        return (kernels.linear_cross_entropy(**inputs, labels_T=labels_T),)

    def reference(hidden_TD: torch.Tensor, weight_VD: torch.Tensor) -> Outputs:
        return (F.cross_entropy(hidden_TD @ weight_VD.t(), labels_T, ignore_index=IGNORE_INDEX, reduction="sum"),)

    yield Case(inputs, kernel, reference)


_CASES: dict[str, Callable[[KernelSet, ModelConfig, RandomInputs], Iterator[Case]]] = {
    **MIXER_CASES,
    **MOE_CASES,
    "rms_norm": _rms_norm,
    "linear_cross_entropy": _linear_cross_entropy,
}
