"""What gates and adds between the large products, in plain torch, each function the contract of its backends.

In bf16 they round after each operation, where the Triton backends round once.

Letters: T tokens, D hidden, N heads, H head dim, R rows, F expert hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

OutputGate = Callable[..., torch.Tensor]
"""A backend of :func:`output_gate_reference`."""
SwiGlu = Callable[..., torch.Tensor]
"""A backend of :func:`swiglu_reference`."""
SharedExpertCombine = Callable[..., torch.Tensor]
"""A backend of :func:`shared_expert_combine_reference`."""
SharedInput = Callable[..., tuple[torch.Tensor, ...]]
"""A backend of :func:`shared_input_reference`."""

MAX_CONSUMERS = 4
"""Readers of a shared input, at most."""


def output_gate_reference(x_TNH: torch.Tensor, gate_TNH: torch.Tensor) -> torch.Tensor:
    """``x * sigmoid(gate)``, the gate on the output of softmax attention.

    Args:
        x_TNH: ``[T, N, H]``.
        gate_TNH: ``[T, N, H]`` of the same dtype; heads may lie apart (a part of a wider projection).

    Returns:
        ``[T, N, H]``.
    """
    return x_TNH * gate_TNH.sigmoid()


def swiglu_reference(gate_up: torch.Tensor, weights_R: torch.Tensor | None = None) -> torch.Tensor:
    """``weight * silu(gate) * up`` of the two halves of each row, the activation of the experts; differentiable.

    A routed row is weighed here, not behind the down projection, which is linear: there the backward pass would need
    the projection's output, D wide, and here it needs what it reads anyway.

    Args:
        gate_up: ``[R, 2F]``, gate first; rows are dense but may lie apart; R may be 0.
        weights_R: ``[R]``, at least fp32; None for 1.

    Returns:
        ``[R, F]``, dense, in the dtype of ``gate_up``.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    product = F.silu(gate) * up
    return product if weights_R is None else (product * weights_R.unsqueeze(1)).to(product.dtype)


def shared_expert_combine_reference(
    residual_TD: torch.Tensor,
    base_TD: torch.Tensor,
    branch_TD: torch.Tensor,
    x_TD: torch.Tensor,
    weight_1D: torch.Tensor,
) -> torch.Tensor:
    """``residual + (base + branch * sigmoid(x @ weight^T))``; differentiable by all five.

    The gate's logit is computed here as well: a matrix product with one column uses a fraction of the device. So is the
    residual sum of which the result is a part: by itself it would read and write all of it once more.

    Args:
        residual_TD: ``[T, D]``.
        base_TD: ``[T, D]``.
        branch_TD: ``[T, D]``.
        x_TD: ``[T, D]``, what the gate depends on.
        weight_1D: ``[1, D]`` of the gate.

    Returns:
        ``[T, D]``, dense, in the dtype of ``base_TD``.
    """
    return residual_TD + (base_TD + branch_TD * F.linear(x_TD, weight_1D).sigmoid())


def shared_input_reference(x: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    """``x``, ``count`` times, for as many consumers; its gradient is the sum of theirs.

    In an order of their own, here from the last consumer to the first: the graph's, which depends on what else is
    computed between the consumers, decides nothing.

    Args:
        x: any shape; must not be changed in place afterwards.
        count: 2 to :data:`MAX_CONSUMERS`; who needs fewer may leave some of them unused.

    Returns:
        Tensors that share the memory of ``x``.
    """
    return SharedInputFunction.apply(x, count)


class SharedInputFunction(torch.autograd.Function):
    """The copies, and their gradients added in plain torch, the last consumer's first."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
        """``count`` views of ``x``."""
        # No zeros for those that nobody used.
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for _ in range(count))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, None]:
        """Sum of the gradients that there are."""
        total = None
        for grad in reversed(grads):
            if grad is not None:
                total = grad if total is None else total + grad
        return total, None
