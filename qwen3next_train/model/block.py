"""One decoder layer: norm, mixer, norm, mixture of experts. Letters: T tokens, D hidden."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from qwen3next_train.config.schema import LayerType, ModelConfig
from qwen3next_train.kernels.selection import KernelSet
from qwen3next_train.kernels.varlen import VarlenMetadata
from qwen3next_train.model.gated_attention import GatedAttention
from qwen3next_train.model.gated_delta_net import GatedDeltaNet
from qwen3next_train.model.moe import SparseMoeBlock
from qwen3next_train.model.norms import FusedAddRmsNorm, RmsNormWithResidual
from qwen3next_train.model.rope import RotaryTable
from qwen3next_train.model.router_losses import RouterStats


@dataclass(frozen=True, eq=False)
class BatchContext:
    """What every layer needs to know of the micro-batch besides its activations.

    Args:
        sequences: document boundaries.
        rotary: angles of the tokens' positions.
        num_rows: rows the tokens consist of.
    """

    sequences: VarlenMetadata
    rotary: RotaryTable
    num_rows: int


class DecoderLayer(nn.Module):
    """Pre-norm layer with a Gated DeltaNet or a gated attention mixer.

    Args:
        config: model section.
        layer_type: which mixer.
        kernels: selected backends.
        moe_block: class of the mixture of experts.
        local_experts: global ids of the experts this rank holds.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer_type: LayerType,
        kernels: KernelSet,
        *,
        moe_block: type[SparseMoeBlock],
        local_experts: range,
    ) -> None:
        super().__init__()
        self.layer_type = layer_type
        if layer_type == "linear_attention":
            self.linear_attn = GatedDeltaNet(config, kernels)
        else:
            self.self_attn = GatedAttention(config, kernels)
        self.mlp = moe_block(config, kernels, local_experts)
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RmsNormWithResidual(hidden, eps, kernels.rms_norm)
        self.post_attention_layernorm = FusedAddRmsNorm(hidden, eps, kernels.rms_norm)

    def forward(self, x_TD: torch.Tensor, context: BatchContext) -> tuple[torch.Tensor, RouterStats]:
        """``[T, D]`` to ``[T, D]`` and the router's statistics."""
        x_TD, normed_TD = self.input_layernorm(x_TD)
        if self.layer_type == "linear_attention":
            y_TD = self.linear_attn(normed_TD, context.sequences)
        else:
            y_TD = self.self_attn(normed_TD, context.sequences, context.rotary)
        x_TD, normed_TD = self.post_attention_layernorm(x_TD, y_TD)
        return self.mlp(normed_TD, context.num_rows, residual_TD=x_TD)
