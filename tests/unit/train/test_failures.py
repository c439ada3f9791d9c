"""Exceptions of libraries and the system, as errors of ours."""

import errno

import numpy as np
import pytest
import torch

from qwen3next_train.config.schema import Config
from qwen3next_train.errors import ExitCode
from qwen3next_train.train.failures import foreseen


def too_large_for_torch() -> None:
    torch.empty(2**60, dtype=torch.uint8)


def too_large_for_numpy() -> None:
    np.ones(2**59, dtype=np.uint8)


@pytest.mark.parametrize("allocate", [too_large_for_torch, too_large_for_numpy])
def test_host_memory_of_the_libraries(allocate):
    with pytest.raises((RuntimeError, MemoryError)) as raised:
        allocate()
    known = foreseen(raised.value, Config())
    assert known is not None
    assert known.exit_code == ExitCode.NO_MEMORY == 71
    assert str(known).startswith("out of memory on the host")
    assert "data.num_prefetch_steps (2)" in str(known)


@pytest.mark.parametrize(
    ("error", "begin"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
            "out of memory on the GPU (tried to allocate 2.00 GiB); add layer to parallel.recompute, ",
        ),
        (RuntimeError("CUDA error: out of memory"), "out of memory on the GPU; "),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "out of memory on the GPU; "),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory on the host; "),
        (MemoryError(), "out of memory on the host; "),
    ],
)
def test_memory_in_every_spelling(error, begin):
    known = foreseen(error, Config())
    assert known is not None
    assert (known.exit_code, str(known)[: len(begin)]) == (71, begin)


@pytest.mark.parametrize(
    ("error", "begin"),
    [
        (
            FileNotFoundError(2, "No usable temporary directory found in ['/x']"),
            "TMPDIR: no usable temporary directory",
        ),
        (OSError(30, "Read-only file system", "/home/x"), "/home/x: Read-only file system (OSError); "),
        (BrokenPipeError(32, "Broken pipe"), "input/output: Broken pipe (BrokenPipeError); "),
        (OSError("two\nlines"), "input/output: two lines (OSError); "),
    ],
)
def test_input_and_output(error, begin):
    known = foreseen(error)
    assert known is not None
    assert (known.exit_code, str(known)[: len(begin)]) == (74, begin)
    assert "\n" not in str(known)


@pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("shape mismatch"), AssertionError()])
def test_a_bug_is_none_of_these(error):
    assert foreseen(error) is None
