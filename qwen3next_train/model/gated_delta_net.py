"""Gated DeltaNet, the mixer of the linear-attention layers (arXiv 2412.06464; Megatron-LM PR 1989).

Letters: T tokens, D hidden, H key heads, N value heads, R = N / H, K key head dim, V value head dim,
C = 2HK + NV convolution channels, P = C + NV columns of the large projection, M = 2N columns of the small one, W
convolution width.
"""

from __future__ import annotations

import torch
from torch import nn

from qwen3next_train.config.schema import ModelConfig
from qwen3next_train.kernels.gated_delta_rule import DeltaRule
from qwen3next_train.kernels.gdn_prologue import GdnPrologue, GdnPrologueOutputs, HeadShape
from qwen3next_train.kernels.linear import Linear
from qwen3next_train.kernels.selection import KernelSet
from qwen3next_train.kernels.varlen import VarlenMetadata
from qwen3next_train.model.decoding_cache import DecodingCache, DeltaNetCache
from qwen3next_train.model.norms import GatedNorm
from qwen3next_train.model.recompute import recomputed
from qwen3next_train.model.sequence_group import SlicedSequences, pass_state


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
        self.width = width
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
        head_shares: ranks that divide the heads; this layer has one share of them.
    """

    def __init__(self, config: ModelConfig, kernels: KernelSet, head_shares: int = 1) -> None:
        super().__init__()
        heads = HeadShape.of(config, head_shares)
        self.rule = kernels.gated_delta_rule
        self.passed = DeltaRule(self.rule, kernels.delta_rule_summary, kernels.delta_state_gradient)
        self.dt_bias = nn.Parameter(torch.empty(heads.value_heads))
        self.A_log = nn.Parameter(torch.empty(heads.value_heads))
        self.conv1d = ShortConvolution(heads, config.linear_conv_kernel_dim, kernels.gdn_prologue)
        projected = heads.key_heads * sum(heads.group_sizes)
        self.in_proj_qkvz = Linear(config.hidden_size, projected)
        self.in_proj_ba = Linear(config.hidden_size, 2 * heads.value_heads)
        self.norm = GatedNorm(heads.value_dim, config.rms_norm_eps, kernels.gated_rms_norm)
        self.out_proj = Linear(heads.value_heads * heads.value_dim, config.hidden_size)

    def forward(
        self,
        x_TD: torch.Tensor,
        sequences: VarlenMetadata,
        slices: SlicedSequences | None = None,
        cache: DecodingCache | None = None,
    ) -> torch.Tensor:
        """``[T, D]`` to ``[T, D]``; no state crosses a document's end.

        Args:
            x_TD: this rank's tokens.
            sequences: their documents.
            slices: where the tokens are slices of rows, the rows; then all in between is done for halos too.
            cache: where the tokens go on documents that have begun, what is kept of these.
        """
        if slices is not None:
            x_TD = slices.extended(x_TD)
        qkvz_TP, ba_TM = self.in_proj_qkvz(x_TD), self.in_proj_ba(x_TD)
        if cache is None:
            convolved = sequences if slices is None else slices.convolved
            inputs = self.conv1d(qkvz_TP, ba_TM, self.A_log, self.dt_bias, convolved)
            out_TNV = self._scan(inputs, sequences, slices)
        else:
            kept, width = cache.of(self, DeltaNetCache), self.conv1d.width
            qkvz_XP, ba_XM, extended = kept.extend(qkvz_TP, ba_TM, width=width)
            inputs = self.conv1d(qkvz_XP, ba_XM, self.A_log, self.dt_bias, extended)
            inputs = kept.without_tails(inputs, width=width)
            out_TNV = kept.scan(self.rule, inputs)
        gated_THRV = self.norm(out_TNV.view_as(inputs.z_THRV), inputs.z_THRV)
        mixed_TD = self.out_proj(gated_THRV.flatten(1))
        return mixed_TD if slices is None else slices.own(mixed_TD)

    def _scan(
        self, inputs: GdnPrologueOutputs, sequences: VarlenMetadata, slices: SlicedSequences | None
    ) -> torch.Tensor:
        """The delta rule's outputs ``[T, N, V]``."""
        q_THK, k_THK, v_TNV = inputs.q_THK, inputs.k_THK, inputs.v_TNV
        if slices is None:
            gates = {"g_TN": inputs.g_TN, "beta_TN": inputs.beta_TN}
            out_TNV: torch.Tensor = self.rule(q_THK, k_THK, v_TNV, **gates, sequences=sequences)[0]
            return out_TNV
        gates = {"g_XN": inputs.g_TN, "beta_XN": inputs.beta_TN}
        return pass_state(self.passed, q_THK, k_THK, v_TNV, **gates, slices=slices)
