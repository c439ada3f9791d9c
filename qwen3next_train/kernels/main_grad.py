"""The buffer that a parameter's gradients are summed in, which kernels may write to themselves.

Megatron-LM's name and means (``gradient_accumulation_fusion``): the product that makes a weight's gradient adds to the
buffer in its epilogue, instead of writing a bf16 gradient that another kernel reads and adds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(eq=False)
class MainGrad:
    """The sum of a parameter's gradients over the micro-batches of a step.

    Args:
        values: of the parameter's shape, in fp32 or narrower; undefined where ``is_empty``.
        is_empty: nothing was added in this step, so the first gradient is written and nothing has to be zeroed.
        has_direct: the kernel that made the gradient has added it; what autograd brings is a placeholder.
    """

    values: torch.Tensor
    is_empty: bool = True
    has_direct: bool = False

    def added_directly(self, like: torch.Tensor) -> torch.Tensor:
        """Note that a kernel has written or added to ``values``.

        Returns:
            what the kernel's backward pass returns as the gradient of the parameter ``like``: memory without content,
            so that autograd calls the parameter's hooks.
        """
        self.is_empty, self.has_direct = False, True
        return torch.empty_like(like)

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
