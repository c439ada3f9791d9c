"""Grouped GEMM: one matrix product per expert over rows sorted by expert, by torch alone.

The loop over experts is the contract of the backends; torch's own grouped GEMM is the one that needs no Triton.

Letters: R rows, e local experts, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

GroupedMatmul = Callable[..., torch.Tensor]
"""A backend of :func:`grouped_matmul_reference`."""


def grouped_matmul_reference(x_RI: torch.Tensor, weight_eOI: torch.Tensor, *, counts_e: torch.Tensor) -> torch.Tensor:
    """``x[r] @ weight[expert of r]^T``; rows of expert 0 first, then expert 1, and so on.

    Every weight gets a gradient (zero for an expert without rows), also when R is 0. There may be room for more rows
    than there are: what stands behind the last expert's rows is never read as a number, and nothing is computed for it
    (here NaN stands there afterwards, elsewhere whatever was in the memory).

    Args:
        x_RI: rows ``[R, I]`` sorted by expert.
        weight_eOI: stacked expert weights ``[e, O, I]``.
        counts_e: int64 ``[e]``, rows of each expert, R in all at most, on the rows' device.

    Returns:
        ``[R, O]`` in the dtype of ``x_RI``.
    """
    counts = counts_e.tolist()
    rows = x_RI[: sum(counts)].split(counts)
    products = [F.linear(x, weight) for x, weight in zip(rows, weight_eOI.unbind(), strict=True)]
    behind = x_RI.new_full((x_RI.shape[0] - sum(counts), weight_eOI.shape[1]), torch.nan)
    return torch.cat([*products, behind])


def grouped_matmul_grouped_mm(x_RI: torch.Tensor, weight_eOI: torch.Tensor, *, counts_e: torch.Tensor) -> torch.Tensor:
    """By torch's grouped GEMM (CUDA, bf16), which reads the row counts on the device."""
    if x_RI.shape[0] == 0:
        return F.linear(x_RI, weight_eOI[0])
    return F.grouped_mm(x_RI, weight_eOI.mT, offs=counts_e.cumsum(0, dtype=torch.int32))
