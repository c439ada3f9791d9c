"""What using flash-linear-attention changes in the process: the only place in ``kernels`` that changes any of it.

* ``import fla``, and with it the import of any of its modules, also loads ``fla.layers`` and ``fla.models`` where they
  are installed, and they load transformers: seconds at the start of every process, for layers nobody here builds.
  ``fla/__init__.py`` goes on without the two where they are missing.
* Left to itself Triton tries dozens of configurations of each of FLA's kernels when it first meets a shape, which takes
  minutes with an empty cache, and may pick another one in the next process. The folder ``tuned``
  holds, for each compute capability that was measured, the fastest for heads of 128 in FLA's own form;
  ``scripts/benchmarks/tune_fla.py`` writes them.
* Where FlashQLA can be imported, FLA would hand it the delta rule; here that is a choice of its own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_TUNED = Path(__file__).parent / "tuned"
_TUNED_HEAD_DIM = 128
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


def shipped_configs_are_used() -> bool:
    """Whether FLA takes configurations from files, and so tries none itself."""
    return os.environ.get("FLA_CACHE_MODE") == "default"


def use_tuned_configs(capability: tuple[int, int], head_dims: Iterable[int]) -> None:
    """Point FLA to the configurations shipped for a GPU, if there are any. To be called before FLA is imported.

    Not for heads larger than those they were measured with: their tiles may not fit into shared memory there, so Triton
    chooses.

    Users who set ``FLA_CACHE_MODE`` or ``FLA_CONFIG_DIR`` themselves keep what they set; ``FLA_CACHE_MODE=disabled``
    lets Triton choose again.

    Args:
        capability: compute capability of the GPU.
        head_dims: of keys and values of the delta rule; none where they are not known, then as measured.
    """
    folder = _TUNED / f"sm{capability[0]}{capability[1]}"
    if folder.is_dir() and all(dim <= _TUNED_HEAD_DIM for dim in head_dims):
        # The default of each file, whatever the shape: a key of FLA's also holds what does not change the choice.
        os.environ.setdefault("FLA_CACHE_MODE", "default")
        os.environ.setdefault("FLA_CONFIG_DIR", str(folder))


def keep_delta_rule_from_flash_qla() -> None:
    """Let FLA compute the delta rule itself where FlashQLA is installed; a user's ``FLA_FLASH_QLA`` stays."""
    os.environ.setdefault("FLA_FLASH_QLA", "0")
