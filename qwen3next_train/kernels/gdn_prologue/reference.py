"""The delta rule's inputs in plain torch, around any backend of the convolution.

Letters: those of the package.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from qwen3next_train.kernels.causal_conv1d import CausalConv1d
from qwen3next_train.kernels.gdn_prologue import L2_NORM_EPS, GdnPrologueOutputs, HeadShape
from qwen3next_train.kernels.varlen import VarlenMetadata


@dataclass(frozen=True)
class SeparateGdnPrologue:
    """One operation after the other; see the package for the contract.

    The convolution's output is rounded to the dtype of the input before it is normalised.

    Args:
        convolution: backend of the convolution with SiLU.
    """

    convolution: CausalConv1d

    def __call__(
        self,
        qkvz_TP: torch.Tensor,
        ba_TM: torch.Tensor,
        weight_CW: torch.Tensor,
        A_log_N: torch.Tensor,
        dt_bias_N: torch.Tensor,
        *,
        heads: HeadShape,
        sequences: VarlenMetadata,
    ) -> GdnPrologueOutputs:
        """See :class:`GdnPrologue`."""
        grouped_THX = qkvz_TP.unflatten(-1, (heads.key_heads, -1))
        *parts, z_THX = grouped_THX.split(heads.group_sizes, dim=-1)
        x_TC = torch.cat([part.flatten(1) for part in parts], dim=-1)
        keys = heads.key_heads * heads.key_dim
        y_TC = self.convolution(x_TC, weight_CW, sequences=sequences)
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


def _wide(x: torch.Tensor) -> torch.Tensor:
    """``x`` in fp32 if its dtype is narrower, else ``x`` itself."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _l2_norm(x: torch.Tensor) -> torch.Tensor:
    wide = _wide(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + L2_NORM_EPS)).to(x.dtype)
