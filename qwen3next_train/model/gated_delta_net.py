"""Gated DeltaNet, the mixer of the linear-attention layers (arXiv 2412.06464; Megatron-LM PR 1989).

Letters: T tokens, D hidden, H key heads, N value heads, R = N / H, K key head dim, V value head dim,
C = 2HK + NV convolution channels, P = C + NV columns of the large projection, M = 2N columns of the small one, W
convolution width.
"""

from __future__ import annotations

import torch
from torch import nn

from qwen3next_train.config.schema import ModelConfig
from qwen3next_train.kernels.gdn_prologue import GdnPrologue, GdnPrologueOutputs, HeadShape
from qwen3next_train.kernels.linear import Linear
from qwen3next_train.kernels.selection import KernelSet
from qwen3next_train.kernels.varlen import VarlenMetadata
from qwen3next_train.model.norms import GatedNorm
from qwen3next_train.model.recompute import recomputed


class ShortConvolution(nn.Module):
    """Depthwise causal convolution over packed documents, and what is fused with it on the way to the delta rule.

    Args:
        heads: how the projections' columns are divided.
        width: W.
        kernel: selected backend.
    """

    def __init__(self, heads: HeadShape, width: int, kernel: GdnPrologue) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads.channels, 1, width))
        self.heads = heads
        self.kernel = kernel

    def forward(
        self,
        qkvz_TP: torch.Tensor,
        ba_TM: torch.Tensor,
        A_log_N: torch.Tensor,
        dt_bias_N: torch.Tensor,
        sequences: VarlenMetadata,
    ) -> GdnPrologueOutputs:
        """Operands of the delta rule and the gate of the norm behind it."""

        def convolve(
            qkvz_TP: torch.Tensor, ba_TM: torch.Tensor, weight: torch.Tensor, *gates: torch.Tensor
        ) -> GdnPrologueOutputs:
            return self.kernel(qkvz_TP, ba_TM, weight.squeeze(1), *gates, heads=self.heads, sequences=sequences)

        return recomputed("gdn_prologue", convolve, qkvz_TP, ba_TM, self.weight, A_log_N, dt_bias_N)


class GatedDeltaNet(nn.Module):
    """Projections, short convolution, gates, delta rule, gated norm, output projection.

    Hugging Face stores ``in_proj_qkvz`` per key head as ``[q K | k K | v R*V | z R*V]`` and ``in_proj_ba`` as
    ``[b R | a R]``. Their outputs stay so; the operation behind them reads each head where it is.

    Args:
        config: model section.
        kernels: selected backends.
    """

    def __init__(self, config: ModelConfig, kernels: KernelSet) -> None:
        super().__init__()
        heads = HeadShape.of(config)
        self.rule = kernels.gated_delta_rule
        self.dt_bias = nn.Parameter(torch.empty(heads.value_heads))
        self.A_log = nn.Parameter(torch.empty(heads.value_heads))
        self.conv1d = ShortConvolution(heads, config.linear_conv_kernel_dim, kernels.gdn_prologue)
        projected = heads.key_heads * sum(heads.group_sizes)
        self.in_proj_qkvz = Linear(config.hidden_size, projected)
        self.in_proj_ba = Linear(config.hidden_size, 2 * heads.value_heads)
        self.norm = GatedNorm(heads.value_dim, config.rms_norm_eps, kernels.gated_rms_norm)
        self.out_proj = Linear(heads.value_heads * heads.value_dim, config.hidden_size)

    def forward(self, x_TD: torch.Tensor, sequences: VarlenMetadata) -> torch.Tensor:
        """``[T, D]`` to ``[T, D]``; no state crosses a document's end."""
        qkvz_TP, ba_TM = self.in_proj_qkvz(x_TD), self.in_proj_ba(x_TD)
        inputs = self.conv1d(qkvz_TP, ba_TM, self.A_log, self.dt_bias, sequences)
        out_TNV, _ = self.rule(
            inputs.q_THK,
            inputs.k_THK,
            inputs.v_TNV,
            g_TN=inputs.g_TN,
            beta_TN=inputs.beta_TN,
            sequences=sequences,
        )
        gated_THRV = self.norm(out_TNV.view_as(inputs.z_THRV), inputs.z_THRV)
        return self.out_proj(gated_THRV.flatten(1))
