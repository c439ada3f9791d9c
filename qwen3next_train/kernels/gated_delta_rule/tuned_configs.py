"""Kernel configurations of FLA that are shipped, so that a run need not find them first.

Left to itself Triton tries dozens of configurations of each of FLA's kernels when it first meets a shape, which takes
minutes with an empty cache, and may pick another one in the next process. The folder ``tuned`` holds, for each compute
capability that was measured, the fastest for heads of 128 in FLA's own form; ``scripts/benchmarks/tune_fla.py`` writes
them.
"""

from __future__ import annotations

import os
from pathlib import Path

_TUNED = Path(__file__).parent / "tuned"


def shipped_configs_are_used() -> bool:
    """Whether FLA takes configurations from files, and so tries none itself."""
    return os.environ.get("FLA_CACHE_MODE") == "default"


def use_tuned_configs(capability: tuple[int, int]) -> None:
    """Point FLA to the configurations shipped for a GPU, if there are any. To be called before FLA is imported.

    Users who set ``FLA_CACHE_MODE`` or ``FLA_CONFIG_DIR`` themselves keep what they set; ``FLA_CACHE_MODE=disabled``
    lets Triton choose again.

    Args:
        capability: compute capability of the GPU.
    """
    folder = _TUNED / f"sm{capability[0]}{capability[1]}"
    if folder.is_dir():
        # The default of each file, whatever the shape: a key of FLA's also holds what does not change the choice.
        os.environ.setdefault("FLA_CACHE_MODE", "default")
        os.environ.setdefault("FLA_CONFIG_DIR", str(folder))
