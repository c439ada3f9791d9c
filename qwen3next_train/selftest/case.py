"""One operation on one set of inputs, and the comparison of two ways to run it.

The builders in :mod:`mixer_cases`, :mod:`moe_cases` and :mod:`dense_cases` make an operation's :class:`Case` at the
sizes they are given: small ones for doctor and start-up check, the model's for the benchmark, odd ones for unit tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch

from qwen3next_train.kernels.selection import KernelSet

EPS = 1e-6

Inputs = Mapping[str, torch.Tensor]
Outputs = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One operation on one set of inputs.

    Args:
        inputs: fp64, on the device; each gets a gradient.
        run: the operation as a :class:`KernelSet` has it; called with the set, and with the inputs by name.
        definition: what it has to compute, written out, at times in loops over tokens; called with the inputs by name.
        fp32_inputs: inputs that the model keeps in fp32 when activations are narrower.
        cancelling: inputs whose gradient is a small difference of large terms, see :data:`CANCELLATION`.
        differentiable: nobody differentiates an operation that is not; only its outputs are compared.
    """

    inputs: Inputs
    run: Callable[..., Outputs]
    definition: Callable[..., Outputs]
    fp32_inputs: frozenset[str] = frozenset()
    cancelling: frozenset[str] = frozenset()
    differentiable: bool = True

    def rounded(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The inputs in ``dtype``, or in fp32 where the model keeps that; views stay views of as much."""
        kept_dtype = torch.promote_types(dtype, torch.float32)
        return {
            name: _same_view(value, _base(value).to(kept_dtype if name in self.fp32_inputs else dtype))
            for name, value in self.inputs.items()
        }


CANCELLATION = 5
"""How much more of a cancelling gradient may be wrong in bf16 than of others.

The decay's is a running sum over a document of ``<q, dq> - <k, dk>``. Rounding the true dq and dk to bf16 once changes
it by 1.2e-2 for the cases' heads, up to 5e-2 for a single head, where it changes dq and dk by 2e-3 themselves.
"""


@dataclass(frozen=True)
class RandomInputs:
    """fp64 values drawn on the generator's device: the host's are the same for every device, a GPU's are quick."""

    generator: torch.Generator
    device: torch.device

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal."""
        place = self.generator.device
        return torch.randn(shape, dtype=torch.float64, generator=self.generator, device=place).to(self.device)

    def uniform(self, *shape: int) -> torch.Tensor:
        """Between 0 and 1."""
        place = self.generator.device
        return torch.rand(shape, dtype=torch.float64, generator=self.generator, device=place).to(self.device)


def case_errors(
    case: Case, kernels: KernelSet, dtype: torch.dtype, *, references: KernelSet | None = None
) -> dict[str, float]:
    """Relative error of every output and gradient of one case, named as :func:`compare` names them.

    In bf16 those of cancelling gradients are divided by :data:`CANCELLATION`.

    Args:
        case: the operation and its inputs.
        kernels: whose backend is tried.
        dtype: of the inputs; the reference gets the same rounded values in fp64.
        references: what is right; None: the case's definition.
    """
    reference = case.definition if references is None else partial(case.run, references)
    errors = compare(partial(case.run, kernels), reference, case.rounded(dtype), differentiable=case.differentiable)
    if dtype == torch.bfloat16:
        for name in case.cancelling:
            errors[f"grad {name}"] /= CANCELLATION
    return errors


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference (over 1 where that is 0); infinite if not finite."""
    norm = float(torch.linalg.vector_norm(reference.double()))
    difference = float(torch.linalg.vector_norm(value.double() - reference.double()))
    error = difference / norm if norm > 0 else difference
    return error if error < float("inf") else float("inf")


def compare(
    kernel: Callable[..., Outputs],
    reference: Callable[..., Outputs],
    inputs: Inputs,
    *,
    reference_dtype: torch.dtype | None = torch.float64,
    generator: torch.Generator | None = None,
    measure: Callable[[torch.Tensor, torch.Tensor], float] = relative_error,
    around_kernel: AbstractContextManager[None] | None = None,
    differentiable: bool = True,
) -> dict[str, float]:
    """Error of every output of a kernel and of the gradient of every input.

    Args:
        kernel: called with copies of the inputs by name.
        reference: called likewise; gets the same gradients of its outputs.
        inputs: of any dtype; the gradient of a view is that of all of its base.
        reference_dtype: of the reference's copies; None: the kernel's.
        generator: draws the gradients of the outputs; None: one of the host.
        measure: error of a value, given first, and its reference.
        around_kernel: in force while the kernel runs forward and backward.
        differentiable: False compares no gradients; the kernel then runs without them.

    Returns:
        ``output``, ``output 2`` for a second one, and ``grad NAME`` for each input.
    """
    narrow = {name: _leaf(value, value.dtype) for name, value in inputs.items()}
    exact = {name: _leaf(value, reference_dtype or value.dtype) for name, value in inputs.items()}
    with around_kernel or nullcontext(), torch.set_grad_enabled(differentiable):
        outputs = kernel(**{name: view for name, (_, view) in narrow.items()})
        if differentiable:
            upstream = _upstream(outputs, generator or torch.Generator().manual_seed(1))
            torch.autograd.backward(outputs, upstream)
    with _one_thread() if all(value.device.type == "cpu" for value in inputs.values()) else nullcontext():
        expected = reference(**{name: view for name, (_, view) in exact.items()})
        if differentiable:
            torch.autograd.backward(expected, [one.to(of.dtype) for one, of in zip(upstream, expected, strict=True)])
    errors = {}
    for index, (output, right) in enumerate(zip(outputs, expected, strict=True)):
        assert output.shape == right.shape
        errors["output" if index == 0 else f"output {index + 1}"] = measure(output.detach(), right.detach())
    for name, (leaf, _) in narrow.items() if differentiable else ():
        gradient, right_gradient = leaf.grad, exact[name][0].grad
        assert gradient is not None, name
        assert right_gradient is not None, name
        errors[f"grad {name}"] = measure(gradient, right_gradient)
    return errors


def _leaf(tensor: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy that gets a gradient, of the tensor or of its base where it is a view, and the view of that."""
    base = _base(tensor).detach().to(dtype, copy=True).requires_grad_()
    return base, _same_view(tensor, base)


def _base(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor._base is None else tensor._base


def _same_view(tensor: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """``base``, or the view of it that ``tensor`` is of its own."""
    is_view = tensor._base is not None
    return base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()) if is_view else base


def _upstream(outputs: Outputs, generator: torch.Generator) -> list[torch.Tensor]:
    """A gradient of each output."""
    return [RandomInputs(generator, output.device).normal(*output.shape).to(output.dtype) for output in outputs]


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
