"""What the gated delta rule works on, made from the projections of its layer, in plain torch: the backends' contract.

Letters: T tokens, H key heads, N value heads, R = N / H, K key head dim, V value head dim, W convolution width,
C = 2HK + NV convolution channels, P = C + NV columns of the large projection, M = 2N columns of the small one, X any
columns, S slots of the layout with gaps between documents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from qwen3next_train.config.schema import ModelConfig
from qwen3next_train.kernels.norms import at_least_fp32
from qwen3next_train.kernels.varlen import VarlenMetadata, gather_rows, scatter_rows

L2_NORM_EPS = 1e-6
"""Added to the sum of squares of q and k, as FLA and transformers do."""


@dataclass(frozen=True)
class HeadShape:
    """Heads of a layer.

    Args:
        key_heads: H.
        value_heads: N, a multiple of H.
        key_dim: K.
        value_dim: V.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int

    @classmethod
    def of(cls, config: ModelConfig, shares: int = 1) -> HeadShape:
        """That of a model's Gated DeltaNet layers, or of one of equal shares of their heads."""
        return cls(
            key_heads=config.linear_num_key_heads // shares,
            value_heads=config.linear_num_value_heads // shares,
            key_dim=config.linear_key_head_dim,
            value_dim=config.linear_value_head_dim,
        )

    @property
    def group(self) -> int:
        """R, value heads of one key head."""
        return self.value_heads // self.key_heads

    @property
    def group_sizes(self) -> tuple[int, int, int, int]:
        """Columns of q, k, v and z within one key head's part of the large projection."""
        return self.key_dim, self.key_dim, self.group * self.value_dim, self.group * self.value_dim

    @property
    def channels(self) -> int:
        """C."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


class GdnPrologueOutputs(NamedTuple):
    """Operands of the delta rule and the gate of the norm behind it.

    Args:
        q_THK: l2-normalised queries ``[T, H, K]``.
        k_THK: l2-normalised keys ``[T, H, K]``.
        v_TNV: values ``[T, N, V]``.
        z_THRV: gate ``[T, H, R, V]``, a view of the projection.
        g_TN: log decay ``[T, N]``, fp32 (fp64 for fp64 input).
        beta_TN: write strength ``[T, N]``.
    """

    q_THK: torch.Tensor
    k_THK: torch.Tensor
    v_TNV: torch.Tensor
    z_THRV: torch.Tensor
    g_TN: torch.Tensor
    beta_TN: torch.Tensor


GdnPrologue = Callable[..., GdnPrologueOutputs]
"""A backend of :func:`gdn_prologue_reference`."""


def gdn_prologue_reference(
    qkvz_TP: torch.Tensor,
    ba_TM: torch.Tensor,
    weight_CW: torch.Tensor,
    A_log_N: torch.Tensor,
    dt_bias_N: torch.Tensor,
    *,
    heads: HeadShape,
    sequences: VarlenMetadata,
) -> GdnPrologueOutputs:
    """Causal depthwise convolution, SiLU and l2 norm; decays and write strengths.

    q, k and v are :func:`causal_conv1d_reference` of their columns; q and k are then divided by the root of their sum
    of squares plus :data:`L2_NORM_EPS`. ``g = -exp(A_log) * softplus(a + dt_bias)`` and ``beta = sigmoid(b)``. In fp32
    (fp64 for fp64 input) and rounded at the end to the dtype of ``qkvz_TP``, g not at all: bf16 g loses the slow decays
    that carry long context. Plain torch rounds the convolution's output as well, before it is normalised.

    Args:
        qkvz_TP: ``[T, P]``, for each key head ``[q K | k K | v R*V | z R*V]``.
        ba_TM: ``[T, 2N]``, for each key head ``[b R | a R]``.
        weight_CW: filters ``[C, W]`` of all q, then all k, then all v; the last column meets the current token.
        A_log_N: ``[N]``, log of the decay rate.
        dt_bias_N: ``[N]``, added to a.
        heads: how the columns are divided.
        sequences: document boundaries.
    """
    grouped_THX = qkvz_TP.unflatten(-1, (heads.key_heads, -1))
    *parts, z_THX = grouped_THX.split(heads.group_sizes, dim=-1)
    x_TC = torch.cat([part.flatten(1) for part in parts], dim=-1)
    keys = heads.key_heads * heads.key_dim
    y_TC = causal_conv1d_reference(x_TC, weight_CW, sequences=sequences)
    q_T, k_T, v_T = y_TC.split((keys, keys, heads.value_heads * heads.value_dim), dim=-1)
    b_THR, a_THR = ba_TM.unflatten(-1, (heads.key_heads, -1)).chunk(2, dim=-1)
    rate_N = at_least_fp32(A_log_N).exp()
    return GdnPrologueOutputs(
        q_THK=_l2_norm(q_T.unflatten(-1, (heads.key_heads, heads.key_dim))),
        k_THK=_l2_norm(k_T.unflatten(-1, (heads.key_heads, heads.key_dim))),
        v_TNV=v_T.unflatten(-1, (heads.value_heads, heads.value_dim)),
        z_THRV=z_THX.unflatten(-1, (heads.group, heads.value_dim)),
        g_TN=-rate_N * F.softplus(at_least_fp32(a_THR.flatten(1)) + at_least_fp32(dt_bias_N)),
        beta_TN=b_THR.flatten(1).sigmoid(),
    )


def causal_conv1d_reference(x_TC: torch.Tensor, weight_CW: torch.Tensor, *, sequences: VarlenMetadata) -> torch.Tensor:
    """``silu(sum_i weight[:, W-1-i] * x[t-i])`` with x zero before the document's first token.

    One multiply-add per filter column. W - 1 zeros before each document stand for what it must not see.

    Args:
        x_TC: input ``[T, C]``.
        weight_CW: filters ``[C, W]``, the last column meets the current token.
        sequences: document boundaries.

    Returns:
        ``[T, C]`` in the dtype of ``x_TC``.
    """
    width = weight_CW.shape[1]
    slots_T = sequences.spaced_slots(width - 1)
    num_slots = sequences.num_tokens + (width - 1) * sequences.num_documents
    x_SC = scatter_rows(x_TC, slots_T, num_slots)
    weight_WC = weight_CW.t().contiguous()
    length = num_slots - (width - 1)
    y_SC = x_SC[:length] * weight_WC[0]
    for column in range(1, width):
        y_SC = torch.addcmul(y_SC, x_SC[column : column + length], weight_WC[column])
    return F.silu(gather_rows(y_SC, slots_T - (width - 1)))


def _l2_norm(x: torch.Tensor) -> torch.Tensor:
    x_fp32 = at_least_fp32(x)
    return (x_fp32 * torch.rsqrt(x_fp32.square().sum(-1, keepdim=True) + L2_NORM_EPS)).to(x.dtype)
