"""Gated softmax attention, the mixer of the full-attention layers (q/k norm, partial RoPE, output gate).

Letters: T tokens, D hidden, N query heads, G key/value heads, H head dim, X = 2H with the output gate, else H.
"""

from __future__ import annotations

import torch
from torch import nn

from qwen3next_train.config.schema import ModelConfig
from qwen3next_train.kernels.linear import Linear
from qwen3next_train.kernels.selection import KernelSet
from qwen3next_train.kernels.varlen import VarlenMetadata
from qwen3next_train.model.decoding_cache import DecodingCache, KeyValueCache
from qwen3next_train.model.norms import QkNormAndRope
from qwen3next_train.model.recompute import recomputed
from qwen3next_train.model.rope import RotaryTable
from qwen3next_train.model.sequence_group import SlicedSequences, attend_by_heads


class GatedAttention(nn.Module):
    """Causal attention within documents, its output times the sigmoid of a gate.

    ``q_proj`` holds ``[query H | gate H]`` per head when ``attention_output_gate`` is set.

    Args:
        config: model section.
        kernels: selected backends.
        head_shares: ranks that divide the heads; this layer has one share of them, at least one of keys and values.
    """

    def __init__(self, config: ModelConfig, kernels: KernelSet, head_shares: int = 1) -> None:
        super().__init__()
        hidden, self.head_dim = config.hidden_size, config.head_dim
        self.has_gate = config.attention_output_gate
        query_dim = config.num_attention_heads // head_shares * self.head_dim
        kv_dim = max(1, config.num_key_value_heads // head_shares) * self.head_dim
        self.attention = kernels.varlen_attention
        self.output_gate = kernels.output_gate
        self.q_proj = Linear(hidden, query_dim * (2 if self.has_gate else 1))
        self.k_proj = Linear(hidden, kv_dim)
        self.v_proj = Linear(hidden, kv_dim)
        self.o_proj = Linear(query_dim, hidden)
        self.q_norm = QkNormAndRope(self.head_dim, config.rms_norm_eps, kernels.qk_norm_rope)
        self.k_norm = QkNormAndRope(self.head_dim, config.rms_norm_eps, kernels.qk_norm_rope)

    def forward(
        self,
        x_TD: torch.Tensor,
        sequences: VarlenMetadata,
        rotary: RotaryTable,
        slices: SlicedSequences | None = None,
        cache: DecodingCache | None = None,
    ) -> torch.Tensor:
        """``[T, D]`` to ``[T, D]``.

        Args:
            x_TD: this rank's tokens.
            sequences: their documents.
            rotary: angles of their positions.
            slices: where the tokens are slices of rows, the rows.
            cache: where the tokens go on documents that have begun, what is kept of these.
        """
        q_TNX = self.q_proj(x_TD).unflatten(-1, (-1, self.head_dim * (2 if self.has_gate else 1)))
        q_TNH, gate_TNH = q_TNX.split(self.head_dim, dim=-1) if self.has_gate else (q_TNX, None)
        k_TGH = self.k_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        v_TGH = self.v_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        q_TNH, k_TGH = self.q_norm(q_TNH, rotary), self.k_norm(k_TGH, rotary)
        if cache is not None:
            out_TNH = cache.of(self, KeyValueCache).attend(self.attention, q_TNH, k_TGH, v_TGH)
        elif slices is None:
            out_TNH = self.attention(q_TNH, k_TGH, v_TGH, sequences=sequences)
        else:
            out_TNH = attend_by_heads(self.attention, q_TNH, k_TGH, v_TGH, slices=slices)
        if gate_TNH is not None:
            out_TNH = recomputed("activations", self.output_gate, out_TNH, gate_TNH)
        return self.o_proj(out_TNH.flatten(-2))
