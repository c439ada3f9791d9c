"""Python's collector of reference cycles, kept out of what ranks do together."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Look for no garbage inside; what became due is looked for at the first allocation behind it.

    A collection stops one rank in the middle of a step, and all others wait for it at the next exchange; each rank has
    its own in another place. Behind a step all have theirs together. Megatron-LM (``--manual-gc``) and torchtitan
    (``training.gc_freq``) collect between steps as well. A step must leave no tensor in a cycle, or its memory would
    be held until then.
    """
    if not gc.isenabled():
        yield
        return
    try:
        gc.disable()
        yield
    finally:
        gc.enable()
