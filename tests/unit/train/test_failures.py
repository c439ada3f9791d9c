"""Exceptions of libraries and the system, as errors of ours."""

import errno
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

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
        (RuntimeError("can't start new thread"), "out of memory or processes: no further thread starts; raise "),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "out of memory on the host; "),
        (OSError("libtorch_global_deps.so: failed to map segment from shared object"), "out of memory on the host; "),
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


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("TORCH_LOGS", "nonsense", "Invalid log settings: nonsense, must be "),
        ("TORCH_DISTRIBUTED_DEBUG", "nonsense", "The value of TORCH_DISTRIBUTED_DEBUG must be OFF, INFO, or DETAIL"),
    ],
)
def test_a_variable_that_torch_does_not_take(variable, value, said):
    code = (
        "from qwen3next_train.train.failures import foreseen\n"
        "try:\n    import torch.distributed\n"
        "except ValueError as error:\n    known = foreseen(error); print(known.exit_code, known)\n"
    )
    environ = {**os.environ, variable: value}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"2 torch cannot be imported ({said}")
    assert re.search(rf"; mend or unset (\w+, )*{variable}\b", done.stdout)
    assert len(done.stdout.splitlines()) == 1


def test_a_working_directory_that_is_gone(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(FileNotFoundError) as raised:
        Path("runs").absolute()
    known = foreseen(raised.value)
    assert str(known) == (
        "the working directory, which is gone: No such file or directory (FileNotFoundError); free space, fix "
        "permissions or choose another place"
    )


def test_a_limit_of_file_sizes_is_named(monkeypatch):
    error = OSError(errno.EFBIG, "File too large", "a.bin")
    assert str(foreseen(error)).startswith("a.bin: File too large (OSError); free space")
    monkeypatch.setattr(resource, "getrlimit", lambda limit: (8192, -1) if limit == resource.RLIMIT_FSIZE else (-1, -1))
    assert str(foreseen(error)).startswith("a.bin: File too large: raise the limit, ulimit -f, which is 8 (OSError); ")
