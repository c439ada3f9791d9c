"""Micro-batches that pass through a layer together, so that what one waits for is hidden behind the other.

A layer's work on a micro-batch is a generator that yields where it has just sent something to other ranks. Of several
micro-batches each is advanced to its next such place in turn: while the tokens of the first travel to their experts,
the second's mixer computes; while the second's travel, the first's experts compute. Autograd runs the latest node
first, so the backward pass interleaves them in the reversed order, and its exchanges are hidden alike.

DeepSeek-V3 (arXiv 2412.19437, section 3.2.1) overlaps one micro-batch's forward pass with another's backward pass;
Megatron-LM does so without a pipeline (``--overlap-moe-expert-parallel-comm``). Here both are in the same pass, which
leaves the layers' order, ZeRO's hooks and recompute as they are.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import TypeVar

R = TypeVar("R")
Stages = Generator[None, None, R]
"""Work that yields whenever something of it is under way between ranks; its return value is the result."""


def interleaved(works: Iterable[Stages[R]]) -> list[R]:
    """Advance every work to its next yield in turn until all are done; of a single one this is to run it.

    Args:
        works: with equally many stages each.

    Returns:
        their results, in their order.

    Raises:
        ValueError: one of them ended while another went on: exchanges would be posted in another order than intended.
    """
    pending = list(works)
    results: list[R] = []
    while not results:
        for work in pending:
            try:
                next(work)
            except StopIteration as end:
                results.append(end.value)
    if len(results) != len(pending):
        raise ValueError(f"{len(results)} of {len(pending)} micro-batches are through a layer, the others are not")
    return results
