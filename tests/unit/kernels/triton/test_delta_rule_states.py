"""The kernels that pass states, on operands of their own; with the rule around them tests/unit/kernels/fla has them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from qwen3next_train.kernels.triton.delta_rule_states import joined, state_gradient, sum_up_segments
from qwen3next_train.selftest.case import relative_error
from tests.unit.kernels.comparison import uninitialized_is_nan
from tests.unit.kernels.interpreted import DEVICE

CHUNK = 64
KEY_DIM, VALUE_DIM = 24, 72
LENGTHS = 130, 64, 65
ENDS = torch.tensor([0, 130, 194, 259], dtype=torch.int32)
KB = 1024
LIMIT_KB = {"80": 99, "90": 227}
"""Of a program, by compute capability."""

Run = Callable[[dict[str, torch.Tensor]], torch.Tensor]


def operands(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Two key heads, six value heads; queries and gradients as :func:`state_gradient` takes them."""
    generator = torch.Generator().manual_seed(0)
    tokens = int(ENDS[-1])

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(tokens, *shape, generator=generator)

    keys = {name: normal(2, KEY_DIM) / KEY_DIM**0.5 for name in ("q_THK", "k_THK")}
    keys["w_TNK"] = 0.2 * normal(6, KEY_DIM) / KEY_DIM**0.5
    values = {name: normal(6, VALUE_DIM) for name in ("u_TNV", "grad_TNV", "grad_writes_TNV")}
    decays = -0.01 * torch.rand(tokens, 6, generator=generator)
    for start, end in pairwise(ENDS.tolist()):
        for first in range(start, end, CHUNK):
            chunk = slice(first, min(first + CHUNK, end))
            decays[chunk] = decays[chunk].cumsum(0)
    rounded = {name: value.to(DEVICE, dtype) for name, value in (keys | values).items()}
    return rounded | {"g_TN": decays.to(DEVICE)}


def summary(operands: dict[str, torch.Tensor]) -> torch.Tensor:
    named = {name: operands[name] for name in READ[summary]}
    with uninitialized_is_nan():
        return sum_up_segments(**named, cu_seqlens=ENDS.to(DEVICE), chunk=CHUNK)


def gradient(operands: dict[str, torch.Tensor]) -> torch.Tensor:
    named = {name: operands[name] for name in READ[gradient]}
    with uninitialized_is_nan():
        return state_gradient(**named, cu_seqlens=ENDS.to(DEVICE), chunk=CHUNK)


READ: dict[Run, tuple[str, ...]] = {
    summary: ("k_THK", "w_TNK", "u_TNV", "g_TN"),
    gradient: ("q_THK", "k_THK", "w_TNK", "grad_TNV", "grad_writes_TNV", "g_TN"),
}
"""Operands of each."""


def test_transitions_of_half_precision_lose_nothing_to_rounding() -> None:
    """Against the same operands in fp32: states are rounded at every chunk, transitions are not.

    Triton's interpreter multiplies fp16 but not bf16.
    """
    half = operands(torch.float16)
    exact = summary({name: value.float() for name, value in half.items()})
    found = summary(half)
    assert relative_error(found[..., VALUE_DIM:], exact[..., VALUE_DIM:]) < 2e-6
    assert 1e-5 < relative_error(found[..., :VALUE_DIM], exact[..., :VALUE_DIM]) < 1e-3


@pytest.fixture(scope="module")
def clean() -> dict[Run, torch.Tensor]:
    """What comes of finite operands."""
    return {run: run(operands(torch.float32)) for run in READ}


@pytest.mark.parametrize(
    ("run", "name"),
    [(run, name) for run, names in READ.items() for name in names],
    ids=lambda of: getattr(of, "__name__", of),
)
def test_what_is_not_finite_stays_in_its_document_and_head(clean: dict[Run, torch.Tensor], run: Run, name: str) -> None:
    """At a border of documents, where a chunk that is not full ends; a key head is that of three value heads."""
    dirty = operands(torch.float32)
    dirty[name][130, 1] = float("nan")
    heads = [3, 4, 5] if dirty[name].shape[1] == 2 else [1]
    found, expected = run(dirty), clean[run]
    assert torch.isfinite(expected).all()
    touched = torch.zeros(len(LENGTHS), 6, dtype=torch.bool)
    touched[1, heads] = True
    assert torch.equal(found[~touched], expected[~touched])
    assert not torch.isfinite(found[touched]).all()


def test_values_that_are_not_finite_stay_out_of_transitions(clean: dict[Run, torch.Tensor]) -> None:
    """And in their own column of the state."""
    dirty, expected = operands(torch.float32), clean[summary]
    dirty["u_TNV"][:, :, 70] = float("inf")
    found = summary(dirty)
    others = [column for column in range(VALUE_DIM + KEY_DIM) if column != 70]
    assert torch.equal(found[..., others], expected[..., others])


def test_segments_that_are_not_finite_spoil_no_other_document() -> None:
    parts = torch.randn(2, 4, 3, 5, 7 + 5, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    expected = joined(parts, value_dim=7)
    parts[0, 2, 1] = float("nan")
    with uninitialized_is_nan():
        found = joined(parts, value_dim=7)
    assert found[0, 1].isnan().all()
    assert torch.equal(found[0, [0, 2]], expected[0, [0, 2]])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("decay", [-50.0, -1000.0])
def test_decays_below_all_powers_of_two_leave_a_chunks_last_write(decay: float) -> None:
    """Sums of a chunk reach -64,000: nothing is infinite, nothing 0 times infinity."""
    strong = operands(torch.float32)
    strong["w_TNK"].zero_()
    for start, end in pairwise(ENDS.tolist()):
        place = torch.arange(end - start) % CHUNK + 1
        strong["g_TN"][start:end] = decay * place[:, None]
    found = summary(strong)
    last = ENDS[1:].long() - 1
    keys = strong["k_THK"][last].repeat_interleave(3, dim=1)
    expected = keys.unsqueeze(3) * strong["u_TNV"][last].unsqueeze(2)
    assert relative_error(found[..., :VALUE_DIM], expected) < 1e-6
    assert not found[..., VALUE_DIM:].any()
    assert torch.isfinite(gradient(strong)).all()


@pytest.mark.slow
@pytest.mark.skipif(DEVICE.type == "cuda", reason="on a GPU other tests launch the kernels")
def test_kernels_fit_shared_memory(tmp_path: Path) -> None:
    """As launched, of A100s and smaller cards of their kind, and of H100s; FLA takes heads up to 256."""
    # LLVM's optimization is behind the sharing out of memory.
    settings = {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0", "DISABLE_LLVM_OPT": "1"}
    environment = {**os.environ, **settings}
    command = [sys.executable, "-m", "tests.unit.kernels.triton.compiled", "80,90", "8,128,256"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    for capability, kernels in json.loads(done.stdout).items():
        assert {name: list(bytes_of) for name, bytes_of in kernels.items()} == {
            "_sum_up": ["8", "128", "256"],
            "_join": ["8", "128"],
            "_state_gradient": ["8", "128", "256"],
        }
        largest = max(bytes_of for kernel in kernels.values() for bytes_of in kernel.values())
        assert largest <= LIMIT_KB[capability] * KB
