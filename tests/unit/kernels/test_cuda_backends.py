"""Every CUDA backend against its reference on the same device: outputs and gradients, bf16 against fp64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch

from qwen3next_train.config.schema import KernelsConfig, ModelConfig
from qwen3next_train.errors import KernelUnavailable
from qwen3next_train.kernels.gated_delta_rule import gated_delta_rule_reference
from qwen3next_train.kernels.gdn_prologue import HeadShape
from qwen3next_train.kernels.selection import KernelSet, reference_kernels, select_kernels
from qwen3next_train.kernels.varlen import VarlenMetadata
from qwen3next_train.selftest.case import Case, compare
from qwen3next_train.selftest.mixer_cases import (
    delta_rule_summary,
    delta_state_gradient,
    gated_delta_rule,
    varlen_attention,
)
from qwen3next_train.selftest.moe_cases import grouped_matmul
from tests.unit.kernels.comparison import largest_error, random, uninitialized_is_nan
from tests.unit.kernels.packing import CPU

pytestmark = pytest.mark.gpu

LENGTHS = (130, 1, 63, 64, 65, 200)
TOKENS = sum(LENGTHS)
TOLERANCE = 2e-2


def kernels_with(*, head_dim: int = 128, **backends: str) -> KernelSet:
    """Selected kernels for Gated DeltaNet heads of a size, or a skip that says why this machine refuses."""
    names = dict.fromkeys(KernelsConfig.model_fields, "reference") | backends
    model = ModelConfig(linear_key_head_dim=head_dim, linear_value_head_dim=head_dim)
    try:
        return select_kernels(KernelsConfig.model_validate(names), torch.device("cuda"), model=model)
    except KernelUnavailable as refusal:
        pytest.skip(str(refusal))


def documents() -> VarlenMetadata:
    return VarlenMetadata.from_lengths(LENGTHS, torch.device("cuda"))


def check(case: Case, kernels: KernelSet, **inputs: torch.Tensor) -> None:
    """Compare with the reference in fp64, also on inputs in place of the case's."""
    case = replace(case, inputs={**case.inputs, **inputs})
    kernel, reference = partial(case.run, kernels), partial(case.run, reference_kernels())
    found = compare(kernel, reference, case.rounded(torch.bfloat16), measure=largest_error)
    assert max(found.values()) < TOLERANCE, found


def test_flash_attention() -> None:
    for head_dim in (64, 256):
        case = varlen_attention(random(), 8, 2, head_dim, documents())
        check(case, kernels_with(varlen_attention="flash"))


@pytest.mark.parametrize("deterministic", [False, True])
def test_attention_of_documents_of_one_length(deterministic: bool) -> None:
    kernels, draw = kernels_with(varlen_attention="flash"), random()
    torch.set_deterministic_debug_mode("error" if deterministic else "default")
    try:
        for length in (1, 77, 256):
            sequences = VarlenMetadata.from_lengths([length] * 3, torch.device("cuda"))
            queries = draw.normal(3 * length, 8, 512)[..., :256]
            check(varlen_attention(draw, 8, 2, 256, sequences), kernels, q_TNH=queries)
    finally:
        torch.set_deterministic_debug_mode("default")


@pytest.mark.parametrize("backend", ["grouped_mm", "triton"])
@pytest.mark.parametrize("counts", [[100, 0, 7, 93], [0, 0, 200, 0], [0, 0, 0, 0]])
def test_grouped_matmul(backend: str, counts: list[int]) -> None:
    check(grouped_matmul(random(), counts, 64, 128), kernels_with(grouped_matmul=backend))
    check(grouped_matmul(random(), counts, 64, 128, unused_rows=100), kernels_with(grouped_matmul=backend))


@pytest.mark.parametrize(("backend", "head_dim"), [("fla", 64), ("fla", 128), ("fla", 256), ("flash_qla", 128)])
@pytest.mark.parametrize("lengths", [LENGTHS, (TOKENS,), (128, 128)], ids=["packed", "one", "equal"])
def test_gated_delta_rule(
    backend: str, head_dim: int, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FLA_CACHE_MODE", "FLA_CONFIG_DIR"):
        monkeypatch.delenv(name, raising=False)
    kernels, draw = kernels_with(head_dim=head_dim, gated_delta_rule=backend), random()
    if backend == "fla":
        from fla.ops.utils import cache

        # Which FLA reads when it is imported, once in a process, and other cases may have imported it.
        monkeypatch.setattr(cache, "FLA_CACHE_MODE", cache.FlaCacheMode.from_env())
    sequences = VarlenMetadata.from_lengths(lengths, torch.device("cuda"))
    case = gated_delta_rule(draw, HeadShape(2, 4, head_dim, head_dim), sequences)
    # All heads forget: the gradient of a slow decay is a small difference of large terms.
    check(case, kernels, g_TN=-draw.uniform(sequences.num_tokens, 4))


@pytest.mark.parametrize("backend", ["fla", "flash_qla"])
def test_the_gated_delta_rule_repeats_bit_for_bit_and_never_waits_for_the_device(backend: str) -> None:
    kernel, sequences = kernels_with(gated_delta_rule=backend).gated_delta_rule, documents()
    inputs = gated_delta_rule(random(), HeadShape(2, 4, 128, 128), sequences).rounded(torch.bfloat16)
    leaves = [inputs[name].requires_grad_() for name in ("q_THK", "k_THK", "v_TNV")]
    upstream = torch.randn_like(inputs["v_TNV"])

    def gradients(sequences: VarlenMetadata) -> tuple[torch.Tensor, ...]:
        out, _ = kernel(**inputs, sequences=sequences)
        return torch.autograd.grad(out, leaves, upstream)

    first = gradients(sequences)
    fresh = documents()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = gradients(fresh)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_references_run_on_cuda_as_on_cpu() -> None:
    host = VarlenMetadata.from_lengths(LENGTHS, CPU)
    inputs = gated_delta_rule(random(CPU), HeadShape(2, 4, 8, 12), host).rounded(torch.float32)
    expected, _ = gated_delta_rule_reference(**inputs, sequences=host)
    out, _ = gated_delta_rule_reference(**{name: x.cuda() for name, x in inputs.items()}, sequences=documents())
    assert largest_error(out.cpu(), expected) < 1e-4


@pytest.mark.parametrize("backend", ["fla", "flash_qla"])
@pytest.mark.parametrize("lengths", [LENGTHS, (TOKENS,), (1,), (64,)])
@pytest.mark.parametrize("make_case", [delta_rule_summary, delta_state_gradient])
def test_what_passes_states(make_case: Callable[..., Case], backend: str, lengths: tuple[int, ...]) -> None:
    """Every element is written, whatever was in the memory before; states and transitions apart."""
    kernels = kernels_with(gated_delta_rule=backend)
    sequences = VarlenMetadata.from_lengths(lengths, torch.device("cuda"))
    case = make_case(random(), HeadShape(2, 4, 128, 128), sequences)
    inputs = case.rounded(torch.bfloat16)
    with uninitialized_is_nan():
        (found,) = case.run(kernels, **inputs)
    (expected,) = case.run(reference_kernels(), **{name: value.double() for name, value in inputs.items()})
    assert found.dtype == torch.float32
    for part, right in zip(found.double().split(128, dim=-1), expected.split(128, dim=-1), strict=True):
        assert float((part - right).norm() / right.norm()) < TOLERANCE
