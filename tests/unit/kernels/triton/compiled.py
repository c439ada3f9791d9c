"""Prints the shared memory of kernels that pass states, compiled for a GPU of which there need be none here.

``python -m tests.unit.kernels.triton.compiled CAPABILITY,... KEY_DIM,...``; in a process without Triton's interpreter.
Launches are those of the package, of tensors without memory. What is behind LLVM's code, which says how much shared
memory there is, is left out: it takes longest and changes nothing of it.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource

from qwen3next_train.kernels.triton import delta_rule_states

_POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32"}
_KERNELS = {name: getattr(delta_rule_states, name) for name in ("_sum_up", "_join", "_state_gradient")}
_OPTIONS = ("num_warps", "num_stages")


class _Compiled:
    """In a kernel's place: a launch compiles it and says what it takes."""

    def __init__(self, kernel: Any, capability: int, bytes_of: dict[int, int]) -> None:
        self._kernel, self._bytes_of = kernel, bytes_of
        self._target = GPUTarget("cuda", capability, 32)

    def __getitem__(self, _: tuple[int, ...]) -> Callable[..., None]:
        def launch(*operands: Any, **named: Any) -> None:
            options = {name: named.pop(name) for name in _OPTIONS}
            values = inspect.signature(self._kernel.fn).bind(*operands, **named).arguments
            names = list(values)
            types = {name: "constexpr" if name in named else _type(value) for name, value in values.items()}
            divisible = [name for name in names if types[name][0] == "*" or name in ("heads", "value_heads")]
            attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
            source = ASTSource(self._kernel, types, named, attributes)
            compiled = triton.compile(source, target=self._target, options=options)
            self._bytes_of[named["K"]] = compiled.metadata.shared

        return launch


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def shared_bytes(capability: int, key_dims: Iterable[int]) -> dict[str, dict[int, int]]:
    """By kernel and key dim; two documents of four segments, values as wide as keys."""
    found: dict[str, dict[int, int]] = {name: {} for name in _KERNELS}
    for name, kernel in _KERNELS.items():
        setattr(delta_rule_states, name, _Compiled(kernel, capability, found[name]))
    for key_dim in key_dims:
        keys = torch.empty(512, 16, key_dim, dtype=torch.bfloat16, device="meta")
        values, decays = keys.new_empty(512, 32, key_dim), keys.new_empty(512, 32, dtype=torch.float32)
        segments = torch.empty(9, dtype=torch.int32, device="meta")
        parts = delta_rule_states.sum_up_segments(keys, values, values, decays, segments, chunk=64)
        if key_dim <= delta_rule_states.MAX_JOINED_KEY_DIM:
            delta_rule_states.joined(parts.unflatten(0, (2, 4)), value_dim=key_dim)
        delta_rule_states.state_gradient(keys, keys, values, values, values, decays, segments, chunk=64)
    return found


def _stop_behind_llvm() -> None:
    """Have no PTX and no binary made; a compiled kernel takes its name from the PTX."""

    def unnamed_ptx(_: Any, source: Any, metadata: dict[str, Any], *others: Any) -> str:
        metadata["name"] = "unnamed"
        return ""

    CUDABackend.make_ptx = unnamed_ptx
    CUDABackend.make_cubin = lambda *_: b""


if __name__ == "__main__":
    capabilities, key_dims = ([int(word) for word in words.split(",")] for words in sys.argv[1:])
    _stop_behind_llvm()
    print(json.dumps({capability: shared_bytes(capability, key_dims) for capability in capabilities}))
