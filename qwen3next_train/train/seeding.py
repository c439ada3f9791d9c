"""Seeds and CPU threads: what has to be fixed for two runs to give the same bits on CPU.

What matters there, apart from the seed: the number of threads of a process (reductions are split by thread, and
sums are rounded differently when split differently), the kernels (fixed by the configuration) and the machine's
instruction set. Nothing may depend on the order of a ``set`` of strings, which differs from process to process.
The generators' states in a checkpoint are the business of ``checkpoint.train_state``.
"""

from __future__ import annotations

import os
import random

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed the global generators of python, numpy and torch (every device), the same on every rank.

    The model's initial weights and the data order do not use them, so neither depends on the layout of the run.

    Args:
        seed: not negative; any size.
    """
    random.seed(seed)
    # numpy takes 32 bits, torch 64.
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed % 2**63)


def fix_cpu_threads(local_world_size: int) -> int:
    """Fix the number of CPU threads of this process, so that results do not depend on the load of the machine.

    ``OMP_NUM_THREADS`` decides when set (torchrun sets it to 1 for several processes); otherwise the processes of
    a machine share its cores. To get the same bits on another machine, set it to the same number there.

    Args:
        local_world_size: processes of this run on this machine.

    Returns:
        The number of threads, for ``run.json``.
    """
    assert local_world_size > 0
    num_threads = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        num_threads = max(1, num_threads // local_world_size)
    # Also when it is the default: this tells MKL not to choose a number by itself from call to call.
    torch.set_num_threads(num_threads)
    return num_threads


def use_deterministic_kernels(device: torch.device) -> None:
    """On CPU, let torch refuse operations whose result depends on the order of threads; CUDA is left as it is."""
    if device.type != "cpu":
        return
    # Not use_deterministic_algorithms: that sets an option of torch.compile too, which is not used here and whose
    # import takes seconds of every rank's start.
    torch.set_deterministic_debug_mode("error")
    # Filling every fresh tensor with NaN finds bugs and costs time; it is not needed for determinism.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
