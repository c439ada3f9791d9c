"""The delta rule's inputs in plain torch, one operation after the other.

Letters: those of the package, and S slots of the layout with gaps between documents.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qwen3next_train.kernels.gdn_prologue import L2_NORM_EPS, GdnPrologueOutputs, HeadShape
from qwen3next_train.kernels.varlen import VarlenMetadata, gather_rows, scatter_rows


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
    """See the package for the contract; the convolution's output is rounded before it is normalised."""
    grouped_THX = qkvz_TP.unflatten(-1, (heads.key_heads, -1))
    *parts, z_THX = grouped_THX.split(heads.group_sizes, dim=-1)
    x_TC = torch.cat([part.flatten(1) for part in parts], dim=-1)
    keys = heads.key_heads * heads.key_dim
    y_TC = causal_conv1d_reference(x_TC, weight_CW, sequences=sequences)
    q_T, k_T, v_T = y_TC.split((keys, keys, heads.value_heads * heads.value_dim), dim=-1)
    b_THR, a_THR = ba_TM.unflatten(-1, (heads.key_heads, -1)).chunk(2, dim=-1)
    rate_N = _wide(A_log_N).exp()
    return GdnPrologueOutputs(
        q_THK=_l2_norm(q_T.unflatten(-1, (heads.key_heads, heads.key_dim))),
        k_THK=_l2_norm(k_T.unflatten(-1, (heads.key_heads, heads.key_dim))),
        v_TNV=v_T.unflatten(-1, (heads.value_heads, heads.value_dim)),
        z_THRV=z_THX.unflatten(-1, (heads.group, heads.value_dim)),
        g_TN=-rate_N * F.softplus(_wide(a_THR.flatten(1)) + _wide(dt_bias_N)),
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


def _wide(x: torch.Tensor) -> torch.Tensor:
    """``x`` in fp32 if its dtype is narrower, else ``x`` itself."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _l2_norm(x: torch.Tensor) -> torch.Tensor:
    wide = _wide(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + L2_NORM_EPS)).to(x.dtype)
