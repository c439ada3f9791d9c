"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2; Megatron-LM's multi_token_prediction).

Depth k >= 1 predicts, at position t, the token k + 1 further on in the same document. It reads the hidden
state of depth k - 1 at t (depth 0 is the model's output after its final norm) and the embedding of the token
at t + k. A document of five tokens ``A B C D E``::

    position             0    1    2    3    4
    labels (depth 0)     B    C    D    E    -
    depth 1 reads        B    C    D    E    0        embedding of token 0 where there is none
    depth 1 predicts     C    D    E    -    -
    depth 2 reads        C    D    E    0    0
    depth 2 predicts     D    E    -    -    -

If the document goes on with ``F`` after the row's end, depth 0 has the label F at position 4, depth 1 reads it
there and predicts it at position 3. A position without an input token has no target either, and comes after
all positions with one, so what it computes reaches no loss. The targets are made with the batch, from whole rows
(``batch.mtp_targets``).

Letters: T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from qwen3next_train.batch import IGNORE_INDEX
from qwen3next_train.config.schema import ModelConfig
from qwen3next_train.kernels.linear import Linear
from qwen3next_train.kernels.selection import KernelSet
from qwen3next_train.model.block import BatchContext, DecoderLayer
from qwen3next_train.model.moe import SparseMoeBlock
from qwen3next_train.model.norms import ZeroCenteredRmsNorm
from qwen3next_train.model.recompute import recomputed, recomputed_layer
from qwen3next_train.model.router_losses import RouterStats

_NO_TOKEN = 0


def input_ids(targets_T: torch.Tensor) -> torch.Tensor:
    """Tokens that depth k reads, from the targets of depth k - 1."""
    return targets_T.where(targets_T != IGNORE_INDEX, _NO_TOKEN)


class MultiTokenPredictor(nn.Module):
    """Projection, norms shared by the depths, and one full-attention layer per depth.

    Args:
        config: model section with ``mtp_num_layers`` >= 1.
        kernels: selected backends.
        moe_block: class of the mixture of experts.
        local_experts: global ids of the experts this rank holds.
        head_shares: ranks that divide the mixers' heads.
    """

    def __init__(
        self,
        config: ModelConfig,
        kernels: KernelSet,
        *,
        moe_block: type[SparseMoeBlock],
        local_experts: range,
        head_shares: int = 1,
    ) -> None:
        super().__init__()
        hidden, eps, kernel = config.hidden_size, config.rms_norm_eps, kernels.rms_norm
        self.pre_fc_norm_embedding = ZeroCenteredRmsNorm(hidden, eps, kernel)
        self.pre_fc_norm_hidden = ZeroCenteredRmsNorm(hidden, eps, kernel)
        self.fc = Linear(2 * hidden, hidden)
        self.layers = nn.ModuleList(
            DecoderLayer(
                config,
                "full_attention",
                kernels,
                moe_block=moe_block,
                local_experts=local_experts,
                head_shares=head_shares,
            )
            for _ in range(config.mtp_num_layers)
        )
        self.norm = ZeroCenteredRmsNorm(hidden, eps, kernel)

    def forward(
        self,
        hiddens_TD: Sequence[torch.Tensor],
        embeddings_TD: Sequence[torch.Tensor],
        depth: int,
        contexts: Sequence[BatchContext],
    ) -> tuple[list[torch.Tensor], list[RouterStats]]:
        """Hidden state of ``depth`` (from 1) out of the one before, of each micro-batch in flight.

        Args:
            hiddens_TD: hidden states of depth - 1 ``[T, D]``.
            embeddings_TD: embeddings of the tokens ``depth`` further on ``[T, D]``.
            depth: 1 to ``mtp_num_layers``.
            contexts: the micro-batches.
        """
        xs_TD = [self._joined(*parts) for parts in zip(embeddings_TD, hiddens_TD, strict=True)]
        outs_TD, stats = recomputed_layer(self.layers[depth - 1], contexts, *xs_TD)
        return [self.norm(out_TD) for out_TD in outs_TD], stats

    def _joined(self, embedding_TD: torch.Tensor, hidden_TD: torch.Tensor) -> torch.Tensor:
        normed = self.pre_fc_norm_embedding(embedding_TD), self.pre_fc_norm_hidden(hidden_TD)
        joined: torch.Tensor = self.fc(recomputed("norms", lambda *parts: torch.cat(parts, dim=-1), *normed))
        return joined
