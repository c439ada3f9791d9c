"""Importing flash-linear-attention for its operations alone.

``import fla``, and with it the import of any of its modules, also loads ``fla.layers`` and ``fla.models`` where they
are installed, and they load transformers: seconds at the start of every process, for layers nobody here builds.
``fla/__init__.py`` goes on without the two where they are missing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

_UNUSED = ("fla.layers", "fla.models")


@contextmanager
def only_operations_of_fla() -> Iterator[None]:
    """Make FLA's layers and models look absent to what is imported inside, unless they are loaded already.

    Afterwards ``import fla.layers`` works as ever; only ``fla`` itself has no shorthand for their contents.
    """
    hidden = [name for name in _UNUSED if name not in sys.modules]
    # None is python's own mark of a module that is not to be found.
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
