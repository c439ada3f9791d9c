"""What the gated delta rule works on, made from the projections of its layer: contract of its backends.

Letters: T tokens, H key heads, N value heads, R = N / H, K key head dim, V value head dim, W convolution width,
C = 2HK + NV convolution channels, P = C + NV columns of the large projection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from qwen3next_train.config.schema import ModelConfig
from qwen3next_train.kernels.varlen import VarlenMetadata

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
    def of(cls, config: ModelConfig) -> HeadShape:
        """That of a model's Gated DeltaNet layers."""
        return cls(
            key_heads=config.linear_num_key_heads,
            value_heads=config.linear_num_value_heads,
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


class GdnPrologue(Protocol):
    """What every backend computes."""

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
        """Causal depthwise convolution, SiLU and l2 norm; decays and write strengths.

        q, k and v are ``silu(sum_i weight[:, W-1-i] * x[t-i])`` with x zero before the document's first token; q and
        k are then divided by the root of their sum of squares plus :data:`L2_NORM_EPS`.
        ``g = -exp(A_log) * softplus(a + dt_bias)`` and ``beta = sigmoid(b)``. All in fp32 (fp64 for fp64 input),
        rounded once at the end to the dtype of ``qkvz_TP``, g not at all: bf16 g loses the slow decays that carry
        long context.

        Args:
            qkvz_TP: ``[T, P]``, for each key head ``[q K | k K | v R*V | z R*V]``.
            ba_TM: ``[T, 2N]``, for each key head ``[b R | a R]``.
            weight_CW: filters ``[C, W]`` of all q, then all k, then all v; the last column meets the current token.
            A_log_N: ``[N]``, log of the decay rate.
            dt_bias_N: ``[N]``, added to a.
            heads: how the columns are divided.
            sequences: document boundaries.
        """
