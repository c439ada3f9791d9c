"""Causal softmax attention over packed documents in plain torch, the contract of its backends.

Letters: T tokens, N query heads, G key/value heads (N is a multiple), H head dim, B bins, L slots per bin.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from qwen3next_train.kernels.varlen import BinLayout, VarlenMetadata, gather_rows, scatter_rows

VarlenAttention = Callable[..., torch.Tensor]
"""A backend of :func:`varlen_attention_reference`."""


def varlen_attention_reference(
    q_TNH: torch.Tensor, k_TGH: torch.Tensor, v_TGH: torch.Tensor, *, sequences: VarlenMetadata
) -> torch.Tensor:
    """Each token attends to itself and the earlier tokens of its document; scale ``H ** -0.5``.

    Query head n uses key/value head ``n // (N / G)``. Here torch's scaled_dot_product_attention works on padded bins of
    whole documents.

    Args:
        q_TNH: queries ``[T, N, H]``.
        k_TGH: keys ``[T, G, H]``.
        v_TGH: values ``[T, G, H]``.
        sequences: document boundaries.

    Returns:
        ``[T, N, H]`` in the dtype of ``q_TNH``.
    """
    layout = sequences.bins()
    out_BNLH = F.scaled_dot_product_attention(
        _to_bins(q_TNH, layout),
        _to_bins(k_TGH, layout),
        _to_bins(v_TGH, layout),
        attn_mask=layout.visible_BLL,
        is_causal=layout.visible_BLL is None,
        enable_gqa=True,
    )
    return gather_rows(out_BNLH.transpose(1, 2).flatten(0, 1), layout.slots_T)


def _to_bins(x_TNH: torch.Tensor, layout: BinLayout) -> torch.Tensor:
    padded = scatter_rows(x_TNH, layout.slots_T, layout.num_bins * layout.length)
    return padded.view(layout.num_bins, layout.length, *x_TNH.shape[1:]).transpose(1, 2)
