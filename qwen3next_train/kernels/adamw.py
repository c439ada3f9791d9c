"""One AdamW update of a flat partition, in plain torch: the contract of its backend."""

from __future__ import annotations

from collections.abc import Callable

import torch

AdamWUpdate = Callable[..., None]
"""What :func:`adamw_update_reference` does."""

_CHUNK_NUMEL = 2**24


@torch.no_grad()
def adamw_update_reference(
    master: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    weight: torch.Tensor | None,
    *,
    corrections: torch.Tensor,
    grad_scale: torch.Tensor,
    found_inf: torch.Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """AdamW (arXiv 1711.05101) in place, clipped; nothing changes where the step is to be skipped.

    All arithmetic is fp32. Moments of a narrower dtype are widened, updated, used and only then rounded to nearest: a
    moment loses nothing it would not lose in the next read, as long as a step's decay is larger than its spacing
    (``config.validate``).

    Args:
        master: fp32 weights ``[n]``.
        grad: gradients ``[n]``, fp32 or bf16, read only.
        exp_avg: first moments ``[n]``, fp32 or bf16.
        exp_avg_sq: second moments ``[n]``, likewise.
        weight: receives the updated weights, rounded to its dtype ``[n]``; None: nobody does.
        corrections: ``1 - beta ** t`` of both betas, fp64 ``[2]``, with t the number of this update.
        grad_scale: gradients are divided by it, fp32 ``[]``.
        found_inf: 1 where the step is to be skipped, else 0, fp32 ``[]``.
        lr: learning rate.
        betas: decays of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled; times the learning rate.
    """
    if bool(found_inf):
        return
    first_correction, second_correction = (float(correction) for correction in corrections)
    step_size, root = lr / first_correction, second_correction**0.5
    # In pieces, so that the fp32 copies stay small.
    for start in range(0, master.numel(), _CHUNK_NUMEL):
        weights, gradients, first_moments, second_moments = (
            tensor[start : start + _CHUNK_NUMEL] for tensor in (master, grad, exp_avg, exp_avg_sq)
        )
        scaled = gradients.float() / grad_scale
        first = first_moments.float().lerp(scaled, 1 - betas[0])
        second = (second_moments.float() * betas[1]).addcmul_(scaled, scaled, value=1 - betas[1])
        first_moments.copy_(first)
        second_moments.copy_(second)
        denominator = second.sqrt_().div_(root).add_(eps)
        weights.mul_(1 - lr * weight_decay).addcdiv_(first, denominator, value=-step_size)
        if weight is not None:
            weight[start : start + _CHUNK_NUMEL].copy_(weights)
