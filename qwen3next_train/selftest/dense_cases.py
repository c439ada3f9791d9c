"""Cases of the norms of the residual stream and of the head, their definitions written out.

Letters: those of the operations' modules.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qwen3next_train.kernels.cross_entropy import IGNORE_INDEX
from qwen3next_train.kernels.selection import KernelSet
from qwen3next_train.selftest.case import EPS, Case, Outputs, RandomInputs


def rms_norm(random: RandomInputs, num_tokens: int, size: int, *methods: str) -> Case:
    """Outputs of the named methods of ``RmsNorm`` on the same inputs, in the order of the class."""
    inputs = {"x_TD": random.normal(num_tokens, size)}
    if "fused_add_rms_norm" in methods:
        inputs["y_TD"] = random.normal(num_tokens, size)
    inputs["weight_D"] = random.normal(size) / 4

    def run(
        kernels: KernelSet, x_TD: torch.Tensor, weight_D: torch.Tensor, y_TD: torch.Tensor | None = None
    ) -> Outputs:
        norm = kernels.rms_norm
        outputs = [norm.normalize(x_TD, weight_D, eps=EPS)] if "normalize" in methods else []
        if "rms_norm_with_residual" in methods:
            outputs += norm.rms_norm_with_residual(x_TD, weight_D, eps=EPS)
        if y_TD is not None:
            outputs += norm.fused_add_rms_norm(x_TD, y_TD, weight_D, eps=EPS)
        return tuple(outputs)

    def definition(x_TD: torch.Tensor, weight_D: torch.Tensor, y_TD: torch.Tensor | None = None) -> Outputs:
        def normed(z_TD: torch.Tensor) -> torch.Tensor:
            return z_TD / (z_TD.square().mean(-1, keepdim=True) + EPS).sqrt() * (1 + weight_D)

        sum_TD = x_TD if y_TD is None else x_TD + y_TD
        outputs = [normed(x_TD)] if "normalize" in methods else []
        if "rms_norm_with_residual" in methods:
            outputs += [1 * x_TD, normed(x_TD)]
        if y_TD is not None:
            outputs += [x_TD + y_TD, normed(sum_TD)]
        return tuple(outputs)

    return Case(inputs, run, definition)


def linear_cross_entropy(
    random: RandomInputs,
    num_tokens: int,
    vocabulary: int,
    hidden: int,
    *,
    logit_std: float = 1.0,
    ignore_every: int = 5,
) -> Case:
    """Output head and loss; every so many labels one is ignored, the first."""
    inputs = {
        "hidden_TD": random.normal(num_tokens, hidden),
        "weight_VD": random.normal(vocabulary, hidden) * (logit_std * hidden**-0.5),
    }
    labels_T = (random.uniform(num_tokens) * vocabulary).long()
    labels_T[::ignore_every] = IGNORE_INDEX

    def run(kernels: KernelSet, **inputs: torch.Tensor) -> Outputs:
        return (kernels.linear_cross_entropy(**inputs, labels_T=labels_T),)

    def definition(hidden_TD: torch.Tensor, weight_VD: torch.Tensor) -> Outputs:
        return (F.cross_entropy(hidden_TD @ weight_VD.t(), labels_T, ignore_index=IGNORE_INDEX, reduction="sum"),)

    return Case(inputs, run, definition)
