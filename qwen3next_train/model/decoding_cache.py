"""What generation keeps of documents that grow by a few tokens at a time: nothing earlier is computed twice.

A Gated DeltaNet layer needs of all earlier tokens its state and the last projections, which its convolution reads; what
it keeps never grows. An attention layer keeps every key and value.

Letters: T new tokens, D documents, L tokens a document may have, W convolution width, w = W - 1, X = T + w D tokens,
before each document those that the convolution reads; in attention N query heads, G key/value heads, H head dim; in
Gated DeltaNet P and M columns of the projections, N value heads, K key head dim, V value head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import nn

from qwen3next_train.kernels.attention import VarlenAttention
from qwen3next_train.kernels.gated_delta_rule import GatedDeltaRule, delta_rule_step
from qwen3next_train.kernels.gdn_prologue import GdnPrologueOutputs
from qwen3next_train.kernels.varlen import VarlenMetadata, gather_rows, scatter_rows

CacheT = TypeVar("CacheT", "DeltaNetCache", "KeyValueCache")


class DecodingCache:
    """Documents that grow, and what each mixer keeps of them.

    Args:
        num_documents: D.
        max_length: L.
        device: where the model is.
    """

    def __init__(self, num_documents: int, max_length: int, device: torch.device) -> None:
        self.num_documents = num_documents
        self.max_length = max_length
        self._device = device
        self._lengths_D = torch.zeros(num_documents, dtype=torch.int64)
        self._of_mixer: dict[nn.Module, DeltaNetCache | KeyValueCache] = {}
        self.sequences: VarlenMetadata
        """The new tokens by document."""
        self.positions_T: torch.Tensor
        """int64 ``[T]``, positions of the new tokens in their documents."""
        self.slots_T: torch.Tensor
        """int64 ``[T]``, where their keys go in ``[D * L]``."""
        self.longest = 0
        """Tokens of the longest document, the new ones included."""

    def advance(self, counts: Sequence[int]) -> None:
        """Let the documents grow: each mixer then has to be called once.

        Args:
            counts: new tokens of each document, at least one.
        """
        counts_D = torch.tensor(counts)
        document_T = torch.arange(self.num_documents).repeat_interleave(counts_D)
        starts_D = counts_D.cumsum(0) - counts_D
        positions_T = torch.arange(len(document_T)) + (self._lengths_D - starts_D)[document_T]
        self._lengths_D += counts_D
        self.longest = int(self._lengths_D.max())
        assert self.longest <= self.max_length, "documents longer than was said"
        self.sequences = VarlenMetadata.from_lengths(counts, self._device)
        self.positions_T = positions_T.to(self._device)
        self.slots_T = (document_T * self.max_length + positions_T).to(self._device)

    def visible(self) -> torch.Tensor:
        """bool ``[D, 1, 1, longest]``, which keys the newest token of each document sees."""
        slots_L = torch.arange(self.longest, device=self._device)
        return self.sequences.derived(
            ("visible", 0), lambda: (slots_L < self._lengths_D.to(self._device)[:, None])[:, None, None]
        )

    def of(self, mixer: nn.Module, kind: type[CacheT]) -> CacheT:
        """What a mixer keeps; made when it first asks."""
        if mixer not in self._of_mixer:
            self._of_mixer[mixer] = kind(self)
        return cast(CacheT, self._of_mixer[mixer])


class DeltaNetCache:
    """Of a Gated DeltaNet layer: the last projections of each document, and the state of its delta rule.

    Args:
        cache: the documents.
    """

    def __init__(self, cache: DecodingCache) -> None:
        self._cache = cache
        self._tails_DwP: torch.Tensor | None = None
        self._state_DNKV: torch.Tensor | None = None

    def extend(
        self, qkvz_TP: torch.Tensor, ba_TM: torch.Tensor, *, width: int
    ) -> tuple[torch.Tensor, torch.Tensor, VarlenMetadata]:
        """Put the projections that the convolution reads before the new ones, zeros before a document's first token.

        Args:
            qkvz_TP: ``[T, P]``.
            ba_TM: ``[T, M]``, of which the convolution reads none.
            width: W.

        Returns:
            ``[X, P]``, ``[X, M]``, and their documents.
        """
        halo = width - 1
        sequences = self._cache.sequences
        extended, slots_T = sequences.extended(halo), sequences.spaced_slots(halo)
        qkvz_XP, ba_XM = (scatter_rows(x, slots_T, extended.num_tokens) for x in (qkvz_TP, ba_TM))
        offsets_w = torch.arange(halo, device=qkvz_TP.device)
        ends_D = extended.cu_seqlens.long()
        if self._tails_DwP is not None:
            before_Dw = ends_D[:-1, None] + offsets_w
            qkvz_XP.index_copy_(0, before_Dw.flatten(), self._tails_DwP.flatten(0, 1))
        self._tails_DwP = qkvz_XP[ends_D[1:, None] - halo + offsets_w]
        return qkvz_XP, ba_XM, extended

    def without_tails(self, inputs: GdnPrologueOutputs, *, width: int) -> GdnPrologueOutputs:
        """What was computed of the new tokens, ``[X, ...]`` to ``[T, ...]``."""
        slots_T = self._cache.sequences.spaced_slots(width - 1)
        return GdnPrologueOutputs(*(gather_rows(x, slots_T) for x in inputs))

    def scan(self, rule: GatedDeltaRule, inputs: GdnPrologueOutputs) -> torch.Tensor:
        """The delta rule from the states that the tokens before have left: outputs ``[T, N, V]``."""
        q_THK, k_THK, v_TNV, _, g_TN, beta_TN = inputs
        sequences = self._cache.sequences
        if sequences.max_length == 1:
            out_TNV, self._state_DNKV = delta_rule_step(
                q_THK, k_THK, v_TNV, g_DN=g_TN, beta_DN=beta_TN, state_DNKV=self._state_DNKV
            )
            return out_TNV
        out_TNV, self._state_DNKV = rule(
            q_THK,
            k_THK,
            v_TNV,
            g_TN=g_TN,
            beta_TN=beta_TN,
            sequences=sequences,
            initial_state_DNKV=self._state_DNKV,
            output_final_state=True,
        )
        return out_TNV


class KeyValueCache:
    """Of an attention layer: all keys, turned by their positions, and values.

    Args:
        cache: the documents.
    """

    def __init__(self, cache: DecodingCache) -> None:
        self._cache = cache
        self._kept: tuple[torch.Tensor, torch.Tensor] | None = None

    def attend(
        self, attention: VarlenAttention, q_TNH: torch.Tensor, k_TGH: torch.Tensor, v_TGH: torch.Tensor
    ) -> torch.Tensor:
        """Attention of the new tokens over their documents: all of a document at first, then one token at a time.

        Args:
            attention: selected backend, for documents that begin.
            q_TNH: queries ``[T, N, H]``.
            k_TGH: keys ``[T, G, H]``.
            v_TGH: values ``[T, G, H]``.

        Returns:
            ``[T, N, H]``.
        """
        cache = self._cache
        begins = self._kept is None
        if self._kept is None:
            slots = cache.num_documents * cache.max_length
            self._kept = k_TGH.new_zeros(slots, *k_TGH.shape[1:]), v_TGH.new_zeros(slots, *v_TGH.shape[1:])
        for kept, new_TGH in zip(self._kept, (k_TGH, v_TGH), strict=True):
            kept.index_copy_(0, cache.slots_T, new_TGH)
        if begins:
            out_TNH: torch.Tensor = attention(q_TNH, k_TGH, v_TGH, sequences=cache.sequences)
            return out_TNH
        assert cache.sequences.max_length == 1, "documents go on by one token"
        k_DGLH, v_DGLH = (
            kept.unflatten(0, (cache.num_documents, -1))[:, : cache.longest].transpose(1, 2) for kept in self._kept
        )
        out_DN1H = F.scaled_dot_product_attention(
            q_TNH.unsqueeze(2), k_DGLH, v_DGLH, attn_mask=cache.visible(), enable_gqa=True
        )
        return out_DN1H.squeeze(2)
