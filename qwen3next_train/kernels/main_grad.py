"""The buffer that a parameter's gradients are summed in, which kernels may write to themselves.

Megatron-LM's name and means (``gradient_accumulation_fusion``): the product that makes a weight's gradient adds to the
buffer in its epilogue, instead of writing a bf16 gradient that another kernel reads and adds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


class MainGrad:
    """The sum of a parameter's gradients over the micro-batches of a step, or of a backward pass.

    ``is_empty``: nothing was added yet, so the first gradient is written and nothing has to be zeroed. ``has_direct``:
    the kernel that made the gradient has added it; what autograd brings is a placeholder.

    Args:
        values: of the parameter's shape, in fp32 or narrower; undefined as long as it is empty.
        borrow: where there are none yet, makes them when they are asked for.
    """

    def __init__(self, values: torch.Tensor | None = None, *, borrow: Callable[[], torch.Tensor] | None = None) -> None:
        self.is_empty = True
        self.has_direct = False
        self._values = values
        self._borrow = borrow

    @property
    def values(self) -> torch.Tensor:
        """To be asked for by backward passes only, which are about to write there."""
        if self._values is None:
            assert self._borrow is not None
            self._values = self._borrow()
        return self._values

    def give_back(self) -> None:
        """Be empty, and hold no memory until the next gradient comes."""
        self._values, self.is_empty = None, True

    def added_directly(self, like: torch.Tensor) -> torch.Tensor | None:
        """Note that a kernel has written or added to ``values``.

        All uses of a parameter must add so, or none: what autograd brings beside a placeholder is lost.

        Returns:
            what the kernel's backward pass returns as the gradient of the parameter ``like``: memory without content,
            so that autograd calls the parameter's hooks; None from the second use of the parameter on, because autograd
            would add two placeholders.
        """
        is_first, self.is_empty, self.has_direct = not self.has_direct, False, True
        return torch.empty_like(like) if is_first else None

    def add_product(self, left_OT: torch.Tensor, right_TI: torch.Tensor) -> None:
        """Add ``left @ right`` to ``values`` ``[O, I]``, the product unrounded until then."""
        add_product(self.values, left_OT, right_TI, first=self.is_empty)
        self.is_empty = False

    def add_scaled(self, gradient: torch.Tensor, factor: torch.Tensor) -> None:
        """Add ``gradient`` times the scalar ``factor``, in one pass over memory."""
        if self.is_empty:
            torch.mul(gradient, factor, out=self.values)
            self.is_empty = False
        else:
            torch.addcmul(self.values, gradient, factor, out=self.values)

    def add(self, gradient: torch.Tensor) -> None:
        """Sum what autograd brings."""
        if self.has_direct:
            self.has_direct = False
        elif self.is_empty:
            self.values.copy_(gradient)
            self.is_empty = False
        else:
            self.values.add_(gradient)

    def finish(self) -> None:
        """Make ``values`` what was summed, also where that is nothing."""
        if self.is_empty:
            self.values.zero_()
            self.is_empty = False


def main_grad_of(parameter: torch.Tensor) -> MainGrad | None:
    """Where the parameter's gradients are summed, None if autograd does so."""
    return getattr(parameter, "main_grad", None)


def scaled_gradient(
    weight: torch.Tensor,
    gradient: torch.Tensor,
    factor: torch.Tensor,
    multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor | None:
    """Hand over ``gradient * factor``, the gradient of ``weight`` that a forward pass has made ahead of its loss.

    Args:
        weight: the parameter.
        gradient: of its shape, in fp32 or the weight's dtype.
        factor: scalar, the gradient of the sum that the forward pass returned.
        multiply: how the two become a tensor of the weight's dtype, where autograd sums.

    Returns:
        what the backward pass returns as the gradient of the weight.
    """
    main_grad = main_grad_of(weight)
    if main_grad is None:
        return multiply(gradient, factor)
    main_grad.add_scaled(gradient, factor)
    return main_grad.added_directly(weight)


def add_product(total_OI: torch.Tensor, left_OT: torch.Tensor, right_TI: torch.Tensor, *, first: bool) -> None:
    """Add ``left @ right`` to ``total_OI``, which may be wider than they are, or write it there if it is the first."""
    if left_OT.dtype == total_OI.dtype:
        torch.addmm(total_OI, left_OT, right_TI, beta=0 if first else 1, out=total_OI)
    elif left_OT.device.type == "cpu":
        # Only the CUDA product can return more precision than it takes.
        product = left_OT.to(total_OI.dtype) @ right_TI.to(total_OI.dtype)
        total_OI.copy_(product if first else total_OI + product)
    elif first:
        torch.mm(left_OT, right_TI, out_dtype=total_OI.dtype, out=total_OI)
    else:
        torch.addmm(total_OI, left_OT, right_TI, out_dtype=total_OI.dtype, out=total_OI)
