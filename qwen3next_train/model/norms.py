"""The norms' weights, each in the module that uses it: zero-centred RMSNorms and GDN's gated norm."""

from __future__ import annotations

from functools import partial
from typing import Generic, TypeVar

import torch
from torch import nn

from qwen3next_train.kernels.norms import GatedRmsNorm, QkNormRope, RmsNorm
from qwen3next_train.model.recompute import is_recomputed, recomputed
from qwen3next_train.model.rope import RotaryTable

Kernel = TypeVar("Kernel")


class _Norm(nn.Module, Generic[Kernel]):
    """Owner of a norm's weight, and the operation that reads it."""

    def __init__(self, size: int, eps: float, kernel: Kernel) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps
        self.kernel = kernel


class ZeroCenteredRmsNorm(_Norm[RmsNorm]):
    """``x / rms(x) * (1 + weight)`` over the last dimension, computed in fp32 and rounded once.

    Weight decay therefore pulls the scale to 1 (Qwen3-Next's reason for decaying the q/k norms).

    Args:
        size: last dimension of the input.
        eps: added to the mean square.
        kernel: selected backend.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., size]`` to the same shape and dtype."""
        return recomputed("norms", partial(self.kernel.normalize, eps=self.eps), x, self.weight)


class RmsNormWithResidual(_Norm[RmsNorm]):
    """The residual stream and its :class:`ZeroCenteredRmsNorm` in one.

    Args:
        size: last dimension of the input.
        eps: added to the mean square.
        kernel: selected backend.
    """

    def forward(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``x`` itself, for whoever adds to it, and its norm, both ``[T, size]``."""
        # Being handed through, x is kept as it is: only the norm is ever made again.
        return recomputed("norms", partial(self.kernel.rms_norm_with_residual, eps=self.eps), x_TD, self.weight)


class FusedAddRmsNorm(_Norm[RmsNorm]):
    """Residual sum and its :class:`ZeroCenteredRmsNorm` in one.

    Args:
        size: last dimension of the input.
        eps: added to the mean square.
        kernel: selected backend.
    """

    def forward(self, x_TD: torch.Tensor, y_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``x + y`` and its norm, both ``[T, size]``."""
        if not is_recomputed("norms"):
            return self.kernel.fused_add_rms_norm(x_TD, y_TD, self.weight, eps=self.eps)
        # The sum is the residual stream, which is kept; the norm is made from it again.
        normalize = partial(self.kernel.rms_norm_with_residual, eps=self.eps)
        return recomputed("norms", normalize, x_TD + y_TD, self.weight)


class QkNormAndRope(_Norm[QkNormRope]):
    """:class:`ZeroCenteredRmsNorm` of queries or keys and their rotary embedding in one.

    Args:
        size: head dimension.
        eps: added to the mean square.
        kernel: selected backend.
    """

    def forward(self, x_TNH: torch.Tensor, table: RotaryTable) -> torch.Tensor:
        """``[T, N, size]``, heads may lie apart, to the same shape, contiguous."""

        def compute(x_TNH: torch.Tensor, weight_H: torch.Tensor) -> torch.Tensor:
            return self.kernel(x_TNH, weight_H, table.cos_T1r, table.sin_T1r, eps=self.eps)

        return recomputed("norms", compute, x_TNH, self.weight)


class GatedNorm(_Norm[GatedRmsNorm]):
    """RMSNorm centred on 1, times SiLU of a gate: the output norm of Gated DeltaNet.

    Args:
        size: value head dimension.
        eps: added to the mean square.
        kernel: selected backend.
    """

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """Both ``[..., size]``; returns the same shape in the gate's dtype."""
        return recomputed("activations", partial(self.kernel, eps=self.eps), x, gate, self.weight)
