"""The optimizer: torch's AdamW, or ours, which updates by one operation and keeps its moments in fp32 or bf16."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from inspect import unwrap
from typing import Any

import torch
from torch.optim import AdamW, Optimizer

from qwen3next_train.config.schema import OptimizerConfig
from qwen3next_train.kernels.adamw import AdamWUpdate, adamw_update_reference
from qwen3next_train.kernels.selection import DTYPES


def build_adamw(
    groups: Iterable[dict[str, Any]], settings: OptimizerConfig, *, fused: bool, update: AdamWUpdate | None = None
) -> Optimizer:
    """AdamW (arXiv 1711.05101) as configured.

    Args:
        groups: parameter groups with their ``weight_decay``.
        settings: rates, decays and the dtype of the moments.
        fused: torch's fused implementation, where torch's is taken.
        update: the operation that ours updates by; None: torch's AdamW, which on fp32 weights refuses bf16 moments, so
            those are ours by the reference.
    """
    betas = (settings.beta1, settings.beta2)
    if update is None and settings.moments_dtype == "fp32":
        return EagerAdamW(groups, lr=settings.lr, betas=betas, eps=settings.eps, fused=fused)
    return OnePassAdamW(
        groups,
        lr=settings.lr,
        betas=betas,
        eps=settings.eps,
        moments_dtype=DTYPES[settings.moments_dtype],
        update=update or adamw_update_reference,
    )


class EagerOptimizer(Optimizer):
    """torch's base class, whose methods import torch.compile to be left out by it: two seconds of a rank's start."""

    add_param_group = unwrap(Optimizer.add_param_group)
    zero_grad = unwrap(Optimizer.zero_grad)


class EagerAdamW(EagerOptimizer, AdamW):
    """torch's AdamW, which does the same."""

    step = torch.no_grad()(unwrap(AdamW.step))


class OnePassAdamW(EagerOptimizer):
    """AdamW on fp32 parameters and gradients, each updated by one operation.

    ``grad_scale`` and ``found_inf`` are torch's protocol for fused optimizers: set from outside, gradients are divided
    by the one, and nothing changes where the other is 1. ``published`` names tensors that receive updated parameters
    rounded to their dtype, by parameter; ``gradients`` the gradients of parameters that have another dtype or live in a
    buffer, in place of ``grad``.

    Args:
        groups: parameter groups, as of ``torch.optim.AdamW``.
        lr: learning rate, where a group has none.
        betas: decays of the moments.
        eps: added to the root of the second moment.
        moments_dtype: of both moments.
        update: the operation.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        moments_dtype: torch.dtype,
        update: AdamWUpdate,
    ) -> None:
        super().__init__(list(groups), {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._moments_dtype = moments_dtype
        self._update = update
        self.grad_scale: torch.Tensor | None = None
        self.found_inf: torch.Tensor | None = None
        self.published: dict[torch.Tensor, torch.Tensor] = {}
        self.gradients: dict[torch.Tensor, torch.Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; there is no closure to evaluate."""
        assert closure is None, "a closure is not supported"
        with_gradient = [
            (parameter, gradient, group)
            for group in self.param_groups
            for parameter in group["params"]
            if (gradient := self.gradients.get(parameter, parameter.grad)) is not None
        ]
        if not with_gradient:
            return
        device = with_gradient[0][0].device
        scale = torch.ones((), device=device) if self.grad_scale is None else self.grad_scale
        found_inf = torch.zeros((), device=device) if self.found_inf is None else self.found_inf
        counts = torch.stack([self._counted(parameter, found_inf) for parameter, *_ in with_gradient]).double()
        # On the device, since only it knows whether a step counts, and for all at once.
        corrections = torch.stack([1 - beta**counts for beta in self.defaults["betas"]], dim=1)
        for (parameter, gradient, group), of_parameter in zip(with_gradient, corrections, strict=True):
            state, published = self.state[parameter], self.published.get(parameter)
            self._update(
                parameter.view(-1),
                gradient.view(-1),
                state["exp_avg"].view(-1),
                state["exp_avg_sq"].view(-1),
                None if published is None else published.view(-1),
                corrections=of_parameter,
                grad_scale=scale,
                found_inf=found_inf,
                lr=group["lr"],
                betas=self.defaults["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
            )

    def _counted(self, parameter: torch.Tensor, found_inf: torch.Tensor) -> torch.Tensor:
        """The number of the parameter's update, as its state keeps it; a skipped one is not counted."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=self._moments_dtype)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=self._moments_dtype)
        state["step"] += 1 - found_inf
        count: torch.Tensor = state["step"]
        return count
