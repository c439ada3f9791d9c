"""One decoder layer: ``x = x + mixer(norm(x)); x = x + moe(norm(x))``. Letters: T tokens, D hidden.

Neither sum stands in this file, because each is computed by the kernel that reads it or writes it next:

* ``x + mixer(norm(x))`` by the second norm (``post_attention_layernorm``), a fused add + RMSNorm. The first norm hands
  x through beside its result, so that the two gradients of x are added in the norm's backward.
* ``x + moe(norm(x))`` at the end of the MoE block, inside the kernel that weighs the shared expert
  (``shared_expert_combine`` of ``kernels/gates.py``); without a gated shared expert by a plain sum there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from qwen3next_train.config.schema import LayerType, ModelConfig
from qwen3next_train.kernels.selection import KernelSet
from qwen3next_train.kernels.varlen import VarlenMetadata
from qwen3next_train.model.decoding_cache import DecodingCache
from qwen3next_train.model.gated_attention import GatedAttention
from qwen3next_train.model.gated_delta_net import GatedDeltaNet
from qwen3next_train.model.head_group import HeadGroup, mixed_by_heads, mixed_by_heads_whole
from qwen3next_train.model.moe import SparseMoeBlock
from qwen3next_train.model.norms import FusedAddRmsNorm, RmsNormWithResidual
from qwen3next_train.model.overlap import Stages, interleaved
from qwen3next_train.model.rope import RotaryTable
from qwen3next_train.model.router_losses import RouterStats
from qwen3next_train.model.sequence_group import SlicedSequences


@dataclass(frozen=True, eq=False)
class BatchContext:
    """What every layer needs to know of the micro-batch besides its activations.

    Args:
        sequences: document boundaries.
        rotary: angles of the tokens' positions.
        num_rows: rows the tokens consist of.
        slices: where the tokens that mixers see are slices of rows, the rows.
        head_group: where this rank has some of the mixers' heads and a share of the tokens they see, those with the
            rest. ``sequences``, ``rotary`` and ``slices`` are of all that mixers see.
        cache: where the tokens go on documents that have begun, what is kept of these.
    """

    sequences: VarlenMetadata
    rotary: RotaryTable
    num_rows: int
    slices: SlicedSequences | None = None
    head_group: HeadGroup | None = None
    cache: DecodingCache | None = None


class DecoderLayer(nn.Module):
    """Pre-norm layer with a Gated DeltaNet or a gated attention mixer: two residual sums, see the module.

    Args:
        config: model section.
        layer_type: which mixer.
        kernels: selected backends.
        moe_block: class of the mixture of experts.
        local_experts: global ids of the experts this rank holds.
        head_shares: ranks that divide the mixer's heads.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer_type: LayerType,
        kernels: KernelSet,
        *,
        moe_block: type[SparseMoeBlock],
        local_experts: range,
        head_shares: int = 1,
    ) -> None:
        super().__init__()
        self.layer_type = layer_type
        if layer_type == "linear_attention":
            self.linear_attn = GatedDeltaNet(config, kernels, head_shares)
        else:
            self.self_attn = GatedAttention(config, kernels, head_shares)
        self.mlp = moe_block(config, kernels, local_experts)
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RmsNormWithResidual(hidden, eps, kernels.rms_norm)
        self.post_attention_layernorm = FusedAddRmsNorm(hidden, eps, kernels.rms_norm)

    def forward(
        self, contexts: Sequence[BatchContext], *xs_TD: torch.Tensor
    ) -> tuple[*tuple[torch.Tensor, ...], list[RouterStats]]:
        """``[T, D]`` to ``[T, D]`` of each micro-batch in flight, and at the end their routers' statistics.

        Activations are arguments and results of their own, not in lists: torch's module hooks, by which ZeRO-3 knows
        when the layer's backward pass begins and ends, look no further.
        """
        works = [self._stages(x_TD, context) for x_TD, context in zip(xs_TD, contexts, strict=True)]
        outputs, stats = zip(*interleaved(works), strict=True)
        return (*outputs, list(stats))

    def _stages(self, x_TD: torch.Tensor, context: BatchContext) -> Stages[tuple[torch.Tensor, RouterStats]]:
        # x = x + mixer(norm(x)): x comes through the first norm unchanged, the second norm adds.
        x_TD, normed_TD = self.input_layernorm(x_TD)
        mixer = partial(self._mixer, context=context)
        if context.head_group is None:
            mixed_TD = mixer(normed_TD)
        elif context.cache is None:
            mixed_TD = mixed_by_heads(mixer, normed_TD, group=context.head_group, num_rows=context.num_rows)
        else:
            mixed_TD = mixed_by_heads_whole(mixer, normed_TD, group=context.head_group)
        x_TD, normed_TD = self.post_attention_layernorm(x_TD, mixed_TD)
        # x = x + moe(norm(x)): the MoE block adds, inside the shared expert's kernel.
        return (yield from self.mlp.stages(normed_TD, context.num_rows, residual_TD=x_TD))

    def _mixer(self, normed_TD: torch.Tensor, context: BatchContext) -> torch.Tensor:
        if self.layer_type == "linear_attention":
            return self.linear_attn(normed_TD, context.sequences, context.slices, context.cache)
        return self.self_attn(normed_TD, context.sequences, context.rotary, context.slices, context.cache)
