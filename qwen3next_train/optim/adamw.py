"""The optimizer: torch's AdamW, or one whose two moments are kept in bf16, which torch's refuses on fp32 weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from inspect import unwrap
from typing import Any

import torch
from torch.optim import AdamW, Optimizer

from qwen3next_train.config.schema import OptimizerConfig

_CHUNK_NUMEL = 2**24


def build_adamw(groups: Iterable[dict[str, Any]], settings: OptimizerConfig, *, fused: bool) -> Optimizer:
    """AdamW (arXiv 1711.05101) as configured.

    Args:
        groups: parameter groups with their ``weight_decay``.
        settings: rates, decays and the dtype of the moments.
        fused: torch's fused implementation; of no meaning with bf16 moments.
    """
    betas = (settings.beta1, settings.beta2)
    if settings.moments_dtype == "bf16":
        return Bf16MomentsAdamW(groups, lr=settings.lr, betas=betas, eps=settings.eps)
    return EagerAdamW(groups, lr=settings.lr, betas=betas, eps=settings.eps, fused=fused)


class EagerOptimizer(Optimizer):
    """torch's base class, whose methods import torch.compile to be left out by it: two seconds of a rank's start."""

    add_param_group = unwrap(Optimizer.add_param_group)
    zero_grad = unwrap(Optimizer.zero_grad)


class EagerAdamW(EagerOptimizer, AdamW):
    """torch's AdamW, which does the same."""

    step = torch.no_grad()(unwrap(AdamW.step))


class Bf16MomentsAdamW(EagerOptimizer):
    """AdamW on fp32 parameters and gradients with bf16 moments.

    All arithmetic is fp32: moments are widened, updated, used and only then rounded to nearest. A moment thus loses
    nothing it would not lose in the next read, as long as a step's decay is larger than bf16's spacing
    (``config.validate``). Works through a parameter in pieces, so that the fp32 copies stay small.

    Args:
        groups: parameter groups, as of ``torch.optim.AdamW``.
        lr: learning rate, where a group has none.
        betas: decays of the moments.
        eps: added to the root of the second moment.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(list(groups), {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; there is no closure to evaluate."""
        assert closure is None, "a closure is not supported"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        state["step"] += 1
        count, (beta1, beta2), lr = state["step"].item(), group["betas"], group["lr"]
        step_size = lr / (1 - beta1**count)
        root_of_correction = math.sqrt(1 - beta2**count)
        tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        for weight, grad, exp_avg, exp_avg_sq in zip(*map(_pieces, tensors), strict=True):
            first = exp_avg.float().lerp_(grad, 1 - beta1)
            second = exp_avg_sq.float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            exp_avg.copy_(first)
            exp_avg_sq.copy_(second)
            denominator = second.sqrt_().div_(root_of_correction).add_(group["eps"])
            weight.mul_(1 - lr * group["weight_decay"]).addcdiv_(first, denominator, value=-step_size)


def _pieces(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tensor.view(-1).split(_CHUNK_NUMEL)
