"""Every CUDA backend against its reference on the same device: outputs and gradients, bf16 against fp64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from qwen3next_train.config.schema import KernelsConfig, ModelConfig
from qwen3next_train.errors import KernelUnavailable
from qwen3next_train.kernels.attention import varlen_attention_reference
from qwen3next_train.kernels.gated_delta_rule import gated_delta_rule_reference
from qwen3next_train.kernels.grouped_gemm import grouped_matmul_reference
from qwen3next_train.kernels.selection import KernelSet, select_kernels
from qwen3next_train.kernels.varlen import VarlenMetadata
from tests.unit.kernels.packing import relative_error

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


def normal(*shape: int) -> torch.Tensor:
    """bf16 values on the device."""
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def compare(
    backend: Callable[..., torch.Tensor], reference: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor]
) -> None:
    """Run ``backend`` on the inputs and ``reference`` on their fp64 copies."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    out, expected = backend(*leaves), reference(*exact)
    upstream = torch.randn_like(expected)
    out.backward(upstream.to(out.dtype))
    expected.backward(upstream)
    assert relative_error(out.detach(), expected.detach()) < TOLERANCE
    for index, (value, twin) in enumerate(zip(leaves, exact, strict=True)):
        assert value.grad is not None
        assert twin.grad is not None
        assert relative_error(value.grad, twin.grad) < TOLERANCE, index


def test_flash_attention() -> None:
    torch.manual_seed(0)
    kernel, sequences = kernels_with(varlen_attention="flash").varlen_attention, documents()
    for head_dim in (64, 256):
        inputs = [normal(TOKENS, heads, head_dim) for heads in (8, 2, 2)]
        compare(
            lambda q, k, v: kernel(q, k, v, sequences=sequences),
            lambda q, k, v: varlen_attention_reference(q, k, v, sequences=sequences),
            inputs,
        )


@pytest.mark.parametrize("deterministic", [False, True])
def test_attention_of_documents_of_one_length(deterministic: bool) -> None:
    torch.manual_seed(0)
    kernel = kernels_with(varlen_attention="flash").varlen_attention
    torch.use_deterministic_algorithms(deterministic)
    try:
        for length in (1, 77, 256):
            sequences = VarlenMetadata.from_lengths([length] * 3, torch.device("cuda"))
            projected = normal(3 * length, 8, 512)
            compare(
                lambda q, k, v, s=sequences: kernel(q[..., :256], k, v, sequences=s),
                lambda q, k, v, s=sequences: varlen_attention_reference(q[..., :256], k, v, sequences=s),
                [projected, *(normal(3 * length, 2, 256) for _ in range(2))],
            )
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", ["grouped_mm", "triton"])
@pytest.mark.parametrize("counts", [[100, 0, 7, 93], [0, 0, 200, 0], [0, 0, 0, 0]])
def test_grouped_matmul(backend: str, counts: list[int]) -> None:
    torch.manual_seed(0)
    kernel = kernels_with(grouped_matmul=backend).grouped_matmul
    counts_e = torch.tensor(counts, device="cuda")
    rows = sum(counts)
    leaves = [normal(rows, 64).requires_grad_(), normal(4, 128, 64).requires_grad_()]
    exact = [tensor.detach().double().requires_grad_() for tensor in leaves]
    out = kernel(*leaves, counts_e=counts_e)
    expected = grouped_matmul_reference(*exact, counts_e=counts_e)
    assert out.shape == expected.shape
    out.float().square().sum().backward()
    expected.square().sum().backward()
    for value, twin in zip(leaves, exact, strict=True):
        assert value.grad is not None
        assert twin.grad is not None
        if twin.grad.numel():
            assert relative_error(value.grad, twin.grad) < TOLERANCE


@pytest.mark.parametrize(("backend", "head_dim"), [("fla", 64), ("fla", 128), ("fla", 256), ("flash_qla", 128)])
@pytest.mark.parametrize("lengths", [LENGTHS, (TOKENS,), (128, 128)], ids=["packed", "one", "equal"])
def test_gated_delta_rule(backend: str, head_dim: int, lengths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    kernel = kernels_with(head_dim=head_dim, gated_delta_rule=backend).gated_delta_rule
    sequences = VarlenMetadata.from_lengths(lengths, torch.device("cuda"))
    tokens, key_heads, value_heads = sum(lengths), 2, 4
    g = -torch.rand(tokens, value_heads, device="cuda")
    beta = torch.rand(tokens, value_heads, device="cuda")
    q, k = (torch.nn.functional.normalize(normal(tokens, key_heads, head_dim), dim=-1) for _ in "qk")
    inputs = [q, k, normal(tokens, value_heads, head_dim)]
    compare(
        lambda q, k, v, g, beta: kernel(q, k, v, g_TN=g, beta_TN=beta, sequences=sequences)[0],
        lambda q, k, v, g, beta: gated_delta_rule_reference(q, k, v, g_TN=g, beta_TN=beta, sequences=sequences)[0],
        [*inputs, g, beta],
    )


@pytest.mark.parametrize("backend", ["fla", "flash_qla"])
def test_the_gated_delta_rule_repeats_bit_for_bit_and_never_waits_for_the_device(backend: str) -> None:
    torch.manual_seed(0)
    kernel, sequences = kernels_with(gated_delta_rule=backend).gated_delta_rule, documents()
    q, k = (torch.nn.functional.normalize(normal(TOKENS, 2, 128), dim=-1).requires_grad_() for _ in "qk")
    v, (decay, strength) = normal(TOKENS, 4, 128).requires_grad_(), torch.rand(2, TOKENS, 4, device="cuda")
    upstream = normal(TOKENS, 4, 128)

    def gradients(sequences: VarlenMetadata) -> tuple[torch.Tensor, ...]:
        out, _ = kernel(q, k, v, g_TN=-decay, beta_TN=strength.bfloat16(), sequences=sequences)
        return torch.autograd.grad(out, (q, k, v), upstream)

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
    torch.manual_seed(0)
    q, k = (torch.nn.functional.normalize(torch.randn(TOKENS, 2, 8), dim=-1) for _ in "qk")
    v = torch.randn(TOKENS, 4, 12)
    g, beta = -torch.rand(TOKENS, 4), torch.rand(TOKENS, 4)
    host = VarlenMetadata.from_lengths(LENGTHS, torch.device("cpu"))
    expected, _ = gated_delta_rule_reference(q, k, v, g_TN=g, beta_TN=beta, sequences=host)
    out, _ = gated_delta_rule_reference(
        q.cuda(), k.cuda(), v.cuda(), g_TN=g.cuda(), beta_TN=beta.cuda(), sequences=documents()
    )
    assert relative_error(out.cpu(), expected) < 1e-4
