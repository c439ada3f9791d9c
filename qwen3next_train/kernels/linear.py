"""Linear layers and the embedding, whose weights' gradients are added where they are summed.

Autograd's own would make a gradient in the weight's dtype, which another kernel reads and adds
(:mod:`qwen3next_train.kernels.main_grad`). Without a ``main_grad`` both are torch's own functions.

Letters: T tokens, I input features, O output features, V vocabulary, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qwen3next_train.kernels.main_grad import MainGrad, main_grad_of


class Linear(nn.Linear):
    """``torch.nn.Linear`` without a bias.

    Args:
        in_features: I.
        out_features: O.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x_TI: torch.Tensor) -> torch.Tensor:
        """``[T, I]`` to ``[T, O]``."""
        return linear(x_TI, self.weight)


class Embedding(nn.Embedding):
    """``torch.nn.Embedding``.

    Args:
        vocabulary: V.
        hidden: D.
    """

    def __init__(self, vocabulary: int, hidden: int) -> None:
        # nn.Embedding would draw its weights, which on the meta device imports torch.compile: two seconds of a start.
        super().__init__(vocabulary, hidden, _weight=torch.empty(vocabulary, hidden))

    def forward(self, ids_T: torch.Tensor) -> torch.Tensor:
        """int64 ``[T]`` to ``[T, D]``."""
        main_grad = main_grad_of(self.weight)
        if main_grad is None:
            return F.embedding(ids_T, self.weight)
        rows_TD: torch.Tensor = _Embedding.apply(ids_T, self.weight, main_grad)
        return rows_TD


def linear(x_TI: torch.Tensor, *weights_OI: torch.Tensor) -> torch.Tensor:
    """``x @ weight^T`` of each weight, side by side: one product, so that the gradient of x is one as well.

    Args:
        x_TI: ``[T, I]``.
        weights_OI: ``[O, I]`` each, of any O; in the dtype of x.

    Returns:
        ``[T, sum of O]``.
    """
    main_grads = [found for weight in weights_OI if (found := main_grad_of(weight)) is not None]
    if len(main_grads) < len(weights_OI):
        return F.linear(x_TI, _joined(weights_OI))
    result: torch.Tensor = _Linear.apply(x_TI, main_grads, *weights_OI)
    return result


def _joined(weights_OI: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return weights_OI[0] if len(weights_OI) == 1 else torch.cat(weights_OI)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: torch.Tensor, main_grads: list[MainGrad], *weights_OI: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x_TI, *weights_OI)
        # Not asked of the saved weights: what recompute puts in a tensor's place has no such attribute.
        ctx.main_grads = main_grads
        return F.linear(x_TI, _joined(weights_OI))

    @staticmethod
    def backward(ctx: Any, grad_TO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TI, *weights_OI = ctx.saved_tensors
        grad_x = grad_TO @ _joined(tuple(weights_OI)) if ctx.needs_input_grad[0] else None
        grads: list[torch.Tensor | None] = [None] * len(weights_OI)
        sides = grad_TO.split([weight.shape[0] for weight in weights_OI], dim=1)
        for index, (weight, main_grad, side_TO) in enumerate(zip(weights_OI, ctx.main_grads, sides, strict=True)):
            if ctx.needs_input_grad[2 + index]:
                main_grad.add_product(side_TO.t(), x_TI)
                grads[index] = main_grad.added_directly(weight)
        return grad_x, None, *grads


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids_T: torch.Tensor, weight_VD: torch.Tensor, main_grad: MainGrad) -> torch.Tensor:
        ctx.save_for_backward(ids_T, weight_VD)
        ctx.main_grad = main_grad
        return F.embedding(ids_T, weight_VD)

    @staticmethod
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ids_T, weight_VD = ctx.saved_tensors
        main_grad: MainGrad = ctx.main_grad
        main_grad.finish()
        total_VD = main_grad.values
        if torch.promote_types(total_VD.dtype, torch.float32) == total_VD.dtype:
            # Equal tokens are sorted and added one after the other, without atomics.
            total_VD.index_put_((ids_T,), grad_TD.to(total_VD.dtype), accumulate=True)
        else:
            # Some tokens stand in a micro-batch a thousand times, too often for sums in bf16.
            dense_VD = torch.zeros_like(total_VD, dtype=torch.float32)
            total_VD += dense_VD.index_put_((ids_T,), grad_TD.float(), accumulate=True)
        return None, main_grad.added_directly(weight_VD), None
