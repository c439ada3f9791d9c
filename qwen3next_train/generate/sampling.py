"""Which token comes next: the likeliest, or one drawn from the likeliest.

Letters: D documents, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

FinishReason = Literal["stop", "length", "not_finite"]
"""``stop``: the end-of-document token came; ``length``: as many tokens as were asked for; ``not_finite``: the model's
logits were no numbers, there is no next token."""

_DRAWN_TOGETHER = 8

NO_TOKEN = -1
"""What :class:`Sampler` chooses where logits are not finite."""


@dataclass(frozen=True)
class Sampling:
    """How documents go on.

    Args:
        max_new_tokens: at most so many tokens.
        temperature: logits are divided by it before one is drawn; 0: the likeliest token is taken (greedy).
        top_p: drawn from the fewest likeliest tokens that have this probability together; 1: from all
            (arXiv 1904.09751).
        top_k: drawn from this many likeliest tokens; 0: from all. The first of the two to apply.
        seed: of what is drawn.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


class Continuation(NamedTuple):
    """What a document goes on with.

    Args:
        ids: the new tokens, the one that ends a document not among them.
        finish_reason: why there are no more.
    """

    ids: list[int]
    finish_reason: FinishReason


class Sampler:
    """Chooses the next tokens of some documents.

    Document i draws from a generator of its own, of seed ``sampling.seed + i``: what it goes on with depends neither on
    the others nor on what else in the process draws.

    Args:
        sampling: how.
        first_document: i of the first.
        num_documents: D.
    """

    def __init__(self, sampling: Sampling, first_document: int, num_documents: int) -> None:
        self._sampling = sampling
        seeds = range(sampling.seed + first_document, sampling.seed + first_document + num_documents)
        # Modulo what a generator takes.
        self._generators = [torch.Generator().manual_seed(seed % 2**63) for seed in seeds]

    def choose(self, logits_DV: torch.Tensor) -> torch.Tensor:
        """Int64 ``[D]`` on the logits' device; :data:`NO_TOKEN` where they are not finite."""
        if self._sampling.temperature == 0:
            chosen_D = logits_DV.argmax(-1)
        else:
            uniform = [torch.rand((), generator=each, dtype=torch.float64) for each in self._generators]
            uniform_D = torch.stack(uniform).to(logits_DV.device)
            # Some at a time: sorted fp64 distributions over a large vocabulary are larger than the logits.
            parts = zip(logits_DV.split(_DRAWN_TOGETHER), uniform_D.split(_DRAWN_TOGETHER), strict=True)
            chosen_D = torch.cat([draw(logits, uniform, self._sampling) for logits, uniform in parts])
        return torch.where(logits_DV.isfinite().all(-1), chosen_D, NO_TOKEN)


def draw(logits_DV: torch.Tensor, uniform_D: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Tokens by inversion of the distribution over the likeliest tokens.

    Args:
        logits_DV: ``[D, V]``, any dtype.
        uniform_D: fp64 ``[D]``, uniform in [0, 1).
        sampling: with a temperature above 0.

    Returns:
        int64 ``[D]``.
    """
    scaled_DV, ids_DV = (logits_DV.double() / sampling.temperature).sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        scaled_DV = scaled_DV[:, : sampling.top_k]
    probability_DV = scaled_DV.softmax(-1)
    sums_DV = probability_DV.cumsum(-1)
    # A token is kept while those before it have less than top_p; the first one always.
    kept_DV = (sums_DV - probability_DV < sampling.top_p).long()
    last_D1 = kept_DV.sum(-1, keepdim=True).clamp(min=1) - 1
    below_DV = sums_DV <= uniform_D[:, None] * sums_DV.gather(1, last_D1)
    place_D1 = below_DV.long().sum(-1, keepdim=True).minimum(last_D1)
    return ids_DV.gather(1, place_D1).squeeze(1)
