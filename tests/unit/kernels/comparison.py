"""A kernel beside its reference: outputs and the gradient of every input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from tests.unit.kernels.packing import relative_error

Operation = Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]

BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
"""Largest difference from the fp64 reference over the largest value."""


def errors(kernel: Operation, reference: Operation, inputs: Sequence[torch.Tensor]) -> list[float]:
    """Relative errors of the outputs, then of the inputs' gradients, against the reference in fp64.

    Args:
        kernel: called with the inputs.
        reference: called with their fp64 copies.
        inputs: leaves without gradients, or views: the gradient of a view is taken through its base.
    """
    narrow = [_twin(tensor, tensor.dtype) for tensor in inputs]
    exact = [_twin(tensor, torch.float64) for tensor in inputs]
    with uninitialized_is_nan():
        outputs = _as_tuple(kernel(*(view for _, view in narrow)))
        torch.manual_seed(1)
        upstream = [torch.randn_like(output) for output in outputs]
        torch.autograd.backward(outputs, upstream)
    expected = _as_tuple(reference(*(view for _, view in exact)))
    torch.autograd.backward(expected, [gradient.double() for gradient in upstream])
    found = [
        relative_error(value.detach(), reference.detach()) for value, reference in zip(outputs, expected, strict=True)
    ]
    for (base, _), (true_base, _) in zip(narrow, exact, strict=True):
        assert base.grad is not None
        assert true_base.grad is not None
        assert base.grad.dtype == base.dtype
        found.append(relative_error(base.grad, true_base.grad))
    assert all(output.isfinite().all() for output in outputs)
    return found


@contextmanager
def uninitialized_is_nan() -> Iterator[None]:
    """Fill what ``torch.empty`` returns with NaN, so that nothing that was not written passes for a result."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _twin(tensor: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A leaf of another dtype, and the view of it that ``tensor`` is of its base."""
    base = (tensor if tensor._base is None else tensor._base).to(dtype, copy=True).requires_grad_()
    return base, base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _as_tuple(result: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (result,) if isinstance(result, torch.Tensor) else result
