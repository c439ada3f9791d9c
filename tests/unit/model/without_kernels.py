"""Run a test module in a process of its own in which transformers takes its torch path.

transformers decides at import: it takes FLA's kernels wherever FLA can be imported, and they fail on the CPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_ROOT = Path(__file__).parents[3]


def ask(module: str, request: Any) -> Any:
    """Run ``python -m module``, which calls :func:`answer`, and return its answer."""
    done = subprocess.run(
        [sys.executable, "-m", module],
        input=json.dumps(request),
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def answer(handle: Callable[[Any], Any]) -> None:
    """Print what ``handle`` makes of the request, in a process where FLA and causal-conv1d cannot be imported."""
    for module in ("fla", "causal_conv1d"):
        sys.modules[module] = None  # type: ignore[assignment]
    torch.set_num_threads(1)
    print(json.dumps(handle(json.load(sys.stdin))))
