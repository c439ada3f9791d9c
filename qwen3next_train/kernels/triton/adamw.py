"""AdamW in one pass: every number of the state is read and written once, the model's weights written beside them.

30 bytes a parameter, with gradients and moments in bf16 20; torch's fused AdamW, a division by the clipping factor
before and a copy to bf16 behind it take 42.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwen3next_train.kernels.triton.row_programs import ceil_div

_BLOCK = 2048


def adamw_update_triton(
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
    """One program a block; nothing is asked of the device on the host."""
    numel = master.numel()
    _adamw_update[(ceil_div(numel, _BLOCK),)](
        master,
        grad,
        exp_avg,
        exp_avg_sq,
        master if weight is None else weight,
        corrections,
        grad_scale,
        found_inf,
        numel,
        lr,
        1 - lr * weight_decay,
        BETA1=betas[0],
        BETA2=betas[1],
        EPS=eps,
        PUBLISH=weight is not None,
        BLOCK=_BLOCK,
    )


@triton.jit
def _adamw_update(
    master,
    grad,
    exp_avg,
    exp_avg_sq,
    weight,
    corrections,
    grad_scale,
    found_inf,
    numel,
    lr,
    decay,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    PUBLISH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of the partition."""
    if tl.load(found_inf) == 0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < numel
        step_size = lr / tl.load(corrections).to(tl.float32)
        root = tl.sqrt(tl.load(corrections + 1).to(tl.float32))
        g = tl.load(grad + at, mask=inside).to(tl.float32) / tl.load(grad_scale)
        first = tl.load(exp_avg + at, mask=inside).to(tl.float32)
        first += (1 - BETA1) * (g - first)
        second = BETA2 * tl.load(exp_avg_sq + at, mask=inside).to(tl.float32) + (1 - BETA2) * g * g
        w = decay * tl.load(master + at, mask=inside) - step_size * first / (tl.sqrt(second) / root + EPS)
        tl.store(exp_avg + at, first.to(exp_avg.dtype.element_ty), mask=inside)
        tl.store(exp_avg_sq + at, second.to(exp_avg_sq.dtype.element_ty), mask=inside)
        tl.store(master + at, w, mask=inside)
        if PUBLISH:
            tl.store(weight + at, w.to(weight.dtype.element_ty), mask=inside)
