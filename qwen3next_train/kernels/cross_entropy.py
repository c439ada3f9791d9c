"""Output head and cross entropy in one, without ever holding all logits, in plain torch: the backends' contract.

Chunk by chunk, with gradients produced in the forward: logits of a chunk are turned into their gradient in place and
used for both weight products at once, so the whole costs the three matrix products a head needs, and no logits are kept
or computed again.

Letters: T tokens, D hidden, V vocabulary, c tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from qwen3next_train.kernels.main_grad import main_grad_of, scaled_gradient

LinearCrossEntropy = Callable[..., torch.Tensor]
"""A backend of :func:`linear_cross_entropy_chunked`."""

IGNORE_INDEX = -100
"""Label of a position without a target (``torch.nn.functional.cross_entropy``'s default)."""

_CHUNK_LOGITS = {"cpu": 2**21, "cuda": 2**30}
"""Logits per chunk: on CPU what stays in cache, on CUDA enough rows (7,000 at 150k tokens) for full speed."""


def linear_cross_entropy_chunked(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_T: torch.Tensor,
    losses_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum over real labels of ``-log softmax(hidden @ weight^T)[label]`` in nats.

    Args:
        hidden_TD: ``[T, D]``.
        weight_VD: head weight ``[V, D]``.
        labels_T: int64 ``[T]``, :data:`IGNORE_INDEX` where there is no target.
        losses_T: fp32 ``[T]``, receives the loss of every position, 0 where there is no target; the sum is the same bit
            for bit with it.

    Returns:
        fp32 scalar (fp64 for fp64 input); 0 when no label is real.
    """
    needs_grad = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad)
    return _LinearCrossEntropy.apply(hidden_TD, weight_VD, labels_T, needs_grad, losses_T)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, labels_T, needs_grad, losses_T):  # type: ignore[no-untyped-def]
        sum_dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
        total = torch.zeros((), dtype=sum_dtype, device=hidden_TD.device)
        grad_TD = torch.empty_like(hidden_TD) if needs_grad else None
        # At least fp32, because the sum over chunks would be rounded after every chunk.
        grad_VD = torch.zeros_like(weight_VD, dtype=sum_dtype) if needs_grad else None
        rows = max(_CHUNK_LOGITS[hidden_TD.device.type] // weight_VD.shape[0], 1)
        for start in range(0, hidden_TD.shape[0], rows):
            chunk = slice(start, start + rows)
            hidden_cD, labels_c1 = hidden_TD[chunk], labels_T[chunk].unsqueeze(1)
            log_probs_cV = torch.log_softmax((hidden_cD @ weight_VD.t()).to(sum_dtype), dim=-1)
            real_c1 = labels_c1 != IGNORE_INDEX
            safe_c1 = labels_c1.where(real_c1, 0)
            log_likelihoods_c1 = log_probs_cV.gather(1, safe_c1) * real_c1
            total -= log_likelihoods_c1.sum()
            if losses_T is not None:
                torch.neg(log_likelihoods_c1.squeeze(1), out=losses_T[chunk])
            if grad_TD is not None and grad_VD is not None:
                _chunk_gradients(log_probs_cV, safe_c1, real_c1, hidden_cD, weight_VD, grad_TD[chunk], grad_VD)
        if grad_VD is not None:
            ctx.weight = weight_VD
            ctx.save_for_backward(grad_TD, grad_VD if main_grad_of(weight_VD) else grad_VD.to(weight_VD.dtype))
        return total

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        grad_TD, grad_VD = ctx.saved_tensors
        grad_weight = scaled_gradient(ctx.weight, grad_VD, grad, _scaled)
        return _scaled(grad_TD, grad), grad_weight, None, None, None


def _scaled(tensor: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Product with the factor unrounded: as bf16, 1 / tokens would be off by up to 0.4 % for every weight."""
    return (tensor.to(factor.dtype) * factor).to(tensor.dtype)


def _chunk_gradients(
    log_probs_cV: torch.Tensor,
    labels_c1: torch.Tensor,
    real_c1: torch.Tensor,
    hidden_cD: torch.Tensor,
    weight_VD: torch.Tensor,
    grad_cD: torch.Tensor,
    grad_VD: torch.Tensor,
) -> None:
    """Turn ``log_probs_cV`` into the logits' gradient, fill ``grad_cD`` and add to ``grad_VD``."""
    grad_cV = log_probs_cV.exp_()
    grad_cV.scatter_add_(1, labels_c1, torch.full_like(labels_c1, -1, dtype=grad_cV.dtype))
    grad_cV.mul_(real_c1)
    grad_cV = grad_cV.to(hidden_cD.dtype)
    torch.mm(grad_cV, weight_VD, out=grad_cD)
    if grad_VD.dtype == grad_cV.dtype:
        grad_VD.addmm_(grad_cV.t(), hidden_cD)
    else:
        grad_VD += grad_cV.t() @ hidden_cD
