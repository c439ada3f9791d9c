"""Tensor parallelism as a layer sees it: the ranks of a group have some heads of every mixer, and shares of its tokens.

Around a mixer the tokens of the group come together, and behind it the heads' outputs, of which each rank's are a term,
are added up and each rank keeps its own tokens (Megatron-LM's sequence parallelism, arXiv 2205.05198). Everything else
of a layer takes a rank's share for its tokens.

Letters: T tokens of this rank, U = P T tokens of its group, r rows, P ranks, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch


class HeadGroup(Protocol):
    """The ranks that divide the heads of the mixers, in the order of their shares of the tokens.

    All of them have to call the same methods in the same order, forward and backward.
    """

    rank: int
    size: int

    def gather(self, x_TD: torch.Tensor) -> torch.Tensor:
        """``[T, D]`` of every rank, one after the other, ``[U, D]``; differentiable."""

    def add_up(self, y_UD: torch.Tensor) -> torch.Tensor:
        """Of all ranks' terms ``[U, D]``, T tokens of rank 0, then of rank 1, this rank's sum ``[T, D]``."""


def mixed_by_heads(
    mixer: Callable[[torch.Tensor], torch.Tensor], x_TD: torch.Tensor, *, group: HeadGroup, num_rows: int
) -> torch.Tensor:
    """A mixer of whose heads this rank has some.

    Args:
        mixer: of all the group's tokens ``[U, D]``, row after row.
        x_TD: this rank's shares of the rows, one after the other.
        group: the ranks with the other heads.
        num_rows: r.

    Returns:
        ``[T, D]``, outputs of all heads for this rank's tokens.
    """
    shares = (group.size, num_rows)
    x_UD = group.gather(x_TD).unflatten(0, (*shares, -1)).transpose(0, 1).flatten(0, 2)
    y_UD = mixer(x_UD).unflatten(0, (num_rows, group.size, -1)).transpose(0, 1).flatten(0, 2)
    return group.add_up(y_UD)


def mixed_by_heads_whole(
    mixer: Callable[[torch.Tensor], torch.Tensor], x_TD: torch.Tensor, *, group: HeadGroup
) -> torch.Tensor:
    """:func:`mixed_by_heads` where every rank of the group has the same tokens, as in generation.

    Args:
        mixer: of the tokens ``[T, D]``.
        x_TD: the tokens.
        group: the ranks with the other heads.

    Returns:
        ``[T, D]``, outputs of all heads, the same on every rank.
    """
    terms_PTD = group.gather(mixer(x_TD)).unflatten(0, (group.size, -1))
    return terms_PTD.sum(0, dtype=torch.promote_types(terms_PTD.dtype, torch.float32)).to(terms_PTD.dtype)
