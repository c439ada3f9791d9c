"""Where the Triton kernels' tests run: on the GPU, or without one on the CPU, by Triton's interpreter (conftest.py)."""

from __future__ import annotations

import inspect
from functools import lru_cache

import numpy as np
import torch
from triton import language
from triton.language.core import is_builtin
from triton.runtime import interpreter

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@lru_cache
def _builtin_names(package: object) -> list[str]:
    """What Triton's interpreter replaces in a module or class of the language."""
    return [name for name, member in inspect.getmembers(package) if is_builtin(member)]


def _patch_builtins(package: object, builder: object, scope: object) -> None:
    """What Triton's own function does.

    It looks through all members of the language again at each launch and each call of a device function, which is a
    third of an interpreted kernel's time.
    """
    for name in _builtin_names(package):
        member = getattr(package, name)
        if is_builtin(member):
            interpreter._patch_attr(package, name, member, builder, scope)


_dtype_of_scalars = lru_cache(interpreter._get_np_dtype)


def _dtype_of(dtype: language.dtype) -> np.dtype:
    """What Triton's own function returns; it writes its table of dtypes down anew for every operation."""
    scalar = dtype.scalar
    return np.dtype(np.uint64) if isinstance(scalar, language.pointer_type) else _dtype_of_scalars(scalar)


interpreter._patch_builtin = _patch_builtins
interpreter._get_np_dtype = _dtype_of
# Or every sum, difference and product of indices would be computed again in int64: a quarter of the time that is left,
# for what no size that is interpreted comes near, and what no compiled kernel does.
interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
