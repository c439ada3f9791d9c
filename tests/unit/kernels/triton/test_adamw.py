"""AdamW in one pass against the reference: state and weights, with clipping, skipped steps and odd lengths."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from qwen3next_train.kernels.adamw import adamw_update_reference
from qwen3next_train.kernels.triton.adamw import adamw_update_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def updated(
    update: Callable[..., None],
    numel: int,
    *,
    moments_dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    found_inf: float = 0.0,
    steps: int = 3,
) -> list[torch.Tensor]:
    """Master, moments and published weights after some steps on random gradients."""
    generator = torch.Generator().manual_seed(numel)
    master = torch.randn(numel, generator=generator).to(DEVICE)
    first, second = (torch.zeros(numel, dtype=moments_dtype, device=DEVICE) for _ in range(2))
    weight = None if weight_dtype is None else torch.zeros(numel, dtype=weight_dtype, device=DEVICE)
    for step in range(1, steps + 1):
        update(
            master,
            torch.randn(numel, generator=generator).to(DEVICE) * 10,
            first,
            second,
            weight,
            corrections=torch.tensor([1 - 0.9**step, 1 - 0.95**step], dtype=torch.float64, device=DEVICE),
            grad_scale=torch.tensor(2.5, device=DEVICE),
            found_inf=torch.tensor(found_inf, device=DEVICE),
            lr=1e-2 / step,
            betas=(0.9, 0.95),
            eps=1e-8,
            weight_decay=0.1,
        )
    return [master, first, second, *([] if weight is None else [weight])]


@pytest.mark.parametrize("weight_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moments_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numel", [1, 2047, 5000])
def test_triton_equals_the_reference(numel: int, moments_dtype: torch.dtype, weight_dtype: torch.dtype | None) -> None:
    """One step, after which a number in bf16 may be rounded the other way; such numbers are not read again."""
    both = [
        updated(update, numel, moments_dtype=moments_dtype, weight_dtype=weight_dtype, steps=1)
        for update in (adamw_update_reference, adamw_update_triton)
    ]
    for expected, found in zip(*both, strict=True):
        tolerance = 1e-6 if expected.dtype == torch.float32 else 2**-7
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=1e-7)


@pytest.mark.parametrize(("moments_dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
def test_several_steps_stay_with_the_reference(moments_dtype: torch.dtype, bound: float) -> None:
    """Triton's interpreter cuts numbers off where it writes bf16, a GPU rounds them."""
    both = [
        updated(update, 4099, moments_dtype=moments_dtype, weight_dtype=torch.float32)
        for update in (adamw_update_reference, adamw_update_triton)
    ]
    for expected, found in zip(*both, strict=True):
        assert float((found.double() - expected.double()).norm() / expected.double().norm()) < bound


def test_a_skipped_step_writes_nothing() -> None:
    fresh = updated(adamw_update_triton, 3000, moments_dtype=torch.float32, weight_dtype=torch.bfloat16, steps=0)
    skipped = updated(
        adamw_update_triton, 3000, moments_dtype=torch.float32, weight_dtype=torch.bfloat16, found_inf=1.0, steps=1
    )
    assert all(torch.equal(a, b) for a, b in zip(fresh, skipped, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("moments_dtype", [torch.float32, torch.bfloat16])
def test_a_large_partition_on_the_gpu(moments_dtype: torch.dtype) -> None:
    both = [
        updated(update, 3_000_001, moments_dtype=moments_dtype, weight_dtype=torch.bfloat16)
        for update in (adamw_update_reference, adamw_update_triton)
    ]
    for expected, found in zip(*both, strict=True):
        assert float((found.double() - expected.double()).norm() / expected.double().norm()) < 1e-3
