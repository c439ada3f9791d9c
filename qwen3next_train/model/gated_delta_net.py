"""Gated DeltaNet, the mixer of the linear-attention layers (arXiv 2412.06464; Megatron-LM PR 1989).

Letters: T tokens, D hidden, H key heads, N value heads, R = N / H, K key head dim, V value head dim,
C = 2HK + NV convolution channels, W convolution width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from qwen3next_train.config.schema import ModelConfig
from qwen3next_train.kernels.causal_conv1d import CausalConv1d
from qwen3next_train.kernels.selection import KernelSet
from qwen3next_train.kernels.sequences import Sequences
from qwen3next_train.model.norms import GatedNorm, at_least_fp32


class GroupedProjection(nn.Module):
    """Linear layer whose output rows are stored interleaved by key head and wanted apart.

    Hugging Face stores ``in_proj_qkvz`` per key head as ``[q K | k K | v R*V | z R*V]`` and ``in_proj_ba``
    as ``[b R | a R]``. The weight is regrouped, not the activations: it is smaller by the factor T / D.

    Args:
        hidden: D.
        num_groups: key heads.
        sizes: rows of each part within one group.
    """

    def __init__(self, hidden: int, num_groups: int, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.sizes = sizes
        self.weight = nn.Parameter(torch.empty(num_groups * sum(sizes), hidden))

    def forward(self, x_TD: torch.Tensor, *, joined: int) -> tuple[torch.Tensor, ...]:
        """Project; the first ``joined`` parts come as one tensor ``[T, rows]``, the others one each."""
        grouped = self.weight.view(self.num_groups, sum(self.sizes), -1)
        parts = [part.flatten(0, 1) for part in grouped.split(self.sizes, dim=1)]
        weights = (torch.cat(parts[:joined]), *parts[joined:])
        return tuple(F.linear(x_TD, weight) for weight in weights)


class ShortConvolution(nn.Module):
    """Depthwise causal convolution and SiLU over packed documents.

    Args:
        channels: C.
        width: W.
        kernel: selected backend.
    """

    def __init__(self, channels: int, width: int, kernel: CausalConv1d) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.kernel = kernel

    def forward(self, x_TC: torch.Tensor, sequences: Sequences) -> torch.Tensor:
        """``[T, C]`` to ``[T, C]``."""
        return self.kernel(x_TC, self.weight.squeeze(1), sequences=sequences)


class GatedDeltaNet(nn.Module):
    """Projections, short convolution, gates, delta rule, gated norm, output projection.

    Args:
        config: model section.
        kernels: selected backends.
    """

    def __init__(self, config: ModelConfig, kernels: KernelSet) -> None:
        super().__init__()
        self.key_heads, self.key_dim = config.linear_num_key_heads, config.linear_key_head_dim
        self.value_heads, self.value_dim = config.linear_num_value_heads, config.linear_value_head_dim
        self.rule = kernels.gated_delta_rule
        group = self.value_heads // self.key_heads
        channels = 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim
        values = group * self.value_dim
        self.dt_bias = nn.Parameter(torch.empty(self.value_heads))
        self.A_log = nn.Parameter(torch.empty(self.value_heads))
        self.conv1d = ShortConvolution(channels, config.linear_conv_kernel_dim, kernels.causal_conv1d)
        self.in_proj_qkvz = GroupedProjection(
            config.hidden_size, self.key_heads, (self.key_dim, self.key_dim, values, values)
        )
        self.in_proj_ba = GroupedProjection(config.hidden_size, self.key_heads, (group, group))
        self.norm = GatedNorm(self.value_dim, config.rms_norm_eps, kernels.gated_rms_norm)
        self.out_proj = nn.Linear(self.value_heads * self.value_dim, config.hidden_size, bias=False)

    def forward(self, x_TD: torch.Tensor, sequences: Sequences) -> torch.Tensor:
        """``[T, D]`` to ``[T, D]``; no state crosses a document's end."""
        qkv_TC, z_T = self.in_proj_qkvz(x_TD, joined=3)
        b_TN, a_TN = self.in_proj_ba(x_TD, joined=1)
        keys = self.key_heads * self.key_dim
        q_T, k_T, v_T = self.conv1d(qkv_TC, sequences).split((keys, keys, self.value_heads * self.value_dim), dim=-1)
        # fp32 whatever the weights are: bf16 g loses the slow decays that carry long context.
        g_TN = -at_least_fp32(self.A_log).exp() * F.softplus(at_least_fp32(a_TN) + at_least_fp32(self.dt_bias))
        out_TNV, _ = self.rule(
            q_T.unflatten(-1, (self.key_heads, self.key_dim)),
            k_T.unflatten(-1, (self.key_heads, self.key_dim)),
            v_T.unflatten(-1, (self.value_heads, self.value_dim)),
            g_TN=g_TN,
            beta_TN=b_TN.sigmoid(),
            sequences=sequences,
        )
        gated_TNV = self.norm(out_TNV, z_T.unflatten(-1, (self.value_heads, self.value_dim)))
        return self.out_proj(gated_TNV.flatten(-2))
