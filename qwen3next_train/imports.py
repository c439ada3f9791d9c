"""Imports of large libraries."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def imported_to_stay() -> Iterator[None]:
    """Import without looking for garbage, there and ever after.

    An import makes several hundred thousand objects that live as long as the process. Python's collector would look
    through them again and again: during the import, now and then in training and twice when the process ends.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
