"""A process apart in which transformers takes its torch path, and ours may be compared with it.

transformers decides at import: it takes FLA's and causal-conv1d's kernels wherever they can be imported, and they fail
on the CPU.
"""

from __future__ import annotations

import sys

import torch

from tests.forked import Apart


def transformers_apart() -> Apart:
    """A new process."""
    return Apart(_without_kernels)


def _without_kernels() -> None:
    for module in ("fla", "causal_conv1d"):
        assert module not in sys.modules
        sys.modules[module] = None  # type: ignore[assignment]
    torch.set_num_threads(1)
