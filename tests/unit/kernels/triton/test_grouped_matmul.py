"""Triton grouped GEMM against the loop over experts, above all with experts that get nothing."""

from __future__ import annotations

import math

import pytest
import torch

from qwen3next_train.kernels.main_grad import MainGrad
from qwen3next_train.selftest.case import relative_error
from qwen3next_train.selftest.moe_cases import grouped_matmul as grouped_matmul_case
from tests.unit.kernels.comparison import check, random, uninitialized_is_nan
from tests.unit.kernels.interpreted import DEVICE


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU rounds the products of fp32 to tf32, and trains in bf16")
@pytest.mark.parametrize("counts", [[3, 130, 0, 128], [0, 70, 0], [1], [130, 260, 128, 1]])
@pytest.mark.parametrize(("num_in", "num_out"), [(64, 24), (72, 264), (20, 520)])
@pytest.mark.parametrize("programs", [1, 3])
def test_triton_equals_the_loop(
    counts: list[int], num_in: int, num_out: int, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen3next_train.kernels.triton import grouped_matmul

    # One program alone writes in order, and so repairs what it wrote beyond an expert's rows.
    monkeypatch.setattr(grouped_matmul, "num_processors", lambda device: programs)
    # In fp32, as Triton's interpreter multiplies no matrices of bf16.
    check(grouped_matmul_case(random(), counts, num_in, num_out), torch.float32)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU rounds the products of fp32 to tf32, and trains in bf16")
@pytest.mark.parametrize("counts", [[3, 130, 0, 128], [130, 3], [0, 0]])
@pytest.mark.parametrize("unused_rows", [1, 200])
def test_triton_with_room_for_more_rows(counts: list[int], unused_rows: int) -> None:
    check(grouped_matmul_case(random(), counts, 72, 264, unused_rows=unused_rows), torch.float32)


@pytest.mark.parametrize("counts", [[3, 130, 5], [0, 0, 0], [0, 256, 0]])
def test_triton_does_not_read_behind_the_last_row(counts: list[int]) -> None:
    """Neither rows nor their gradients; nor does it write there."""
    from qwen3next_train.kernels.triton.grouped_matmul import grouped_matmul_triton

    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    total, room = sum(counts), sum(counts) + 150
    counts_e = torch.tensor(counts, device=DEVICE)
    weight = random().normal(3, 24, 16).to(dtype).requires_grad_()
    x, upstream = random().normal(room, 16).to(dtype), random().normal(room, 24).to(dtype)
    x[total:], upstream[total:] = torch.nan, torch.nan
    x.requires_grad_()
    with uninitialized_is_nan():
        out = grouped_matmul_triton(x, weight, counts_e=counts_e)
        found = torch.autograd.grad(out, (x, weight), upstream)
    assert out[total:].isnan().all()
    assert found[0][total:].isnan().all()
    exact = grouped_matmul_triton(x[:total], weight, counts_e=counts_e)
    expected = torch.autograd.grad(exact, (x, weight), upstream[:total])
    assert torch.equal(out[:total], exact)
    assert torch.equal(found[0][:total], expected[0][:total])
    assert torch.equal(found[1], expected[1])


def test_triton_keeps_what_is_not_finite_with_its_expert() -> None:
    from qwen3next_train.kernels.triton.grouped_matmul import grouped_matmul_triton

    counts, dtype = [3, 130, 5], torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    x = torch.ones(sum(counts), 16, device=DEVICE, dtype=dtype, requires_grad=True)
    # 24 outputs: fewer than are summed at a time in the gradient of the rows.
    weight = torch.ones(3, 24, 16, device=DEVICE, dtype=dtype)
    weight[1] = float("nan")
    weight.requires_grad_()
    out = grouped_matmul_triton(x, weight, counts_e=torch.tensor(counts, device=DEVICE))
    out.sum().backward()
    assert x.grad is not None
    owner = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    for rows in (out.detach(), x.grad):
        assert torch.equal(rows.isnan().all(1).cpu(), owner == 1)
        assert torch.equal(rows.isnan().any(1).cpu(), owner == 1)


def test_triton_without_rows_gives_zero_gradients() -> None:
    from qwen3next_train.kernels.triton.grouped_matmul import grouped_matmul_triton

    x = torch.zeros(0, 8, device=DEVICE, requires_grad=True)
    weight = torch.ones(3, 16, 8, device=DEVICE, requires_grad=True)
    out = grouped_matmul_triton(x, weight, counts_e=torch.zeros(3, dtype=torch.int64, device=DEVICE))
    assert out.shape == (0, 16)
    out.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()
    assert x.grad is not None
    assert x.grad.shape == (0, 8)


def error_of_sums(counts: list[int], num_in: int, num_out: int, dtype: torch.dtype) -> float:
    """Relative error of the weights' gradients of three micro-batches, summed in ``main_grad``."""
    from qwen3next_train.kernels.triton.grouped_matmul import grouped_matmul_triton

    draw, experts = random(), len(counts)
    weight = torch.nn.Parameter(draw.normal(experts, num_out, num_in).to(dtype))
    # What is there before is not a number, so that reading it shows.
    main_grad = MainGrad(torch.full((experts, num_out, num_in), math.nan, device=DEVICE))
    weight.main_grad = main_grad  # type: ignore[attr-defined]
    weight.register_post_accumulate_grad_hook(lambda p: p.main_grad.add(p.grad))
    expected = torch.zeros(experts, num_out, num_in, dtype=torch.float64)
    for _ in range(3):
        x, upstream = (draw.normal(sum(counts), features).to(dtype) for features in (num_in, num_out))
        out = grouped_matmul_triton(x.requires_grad_(), weight, counts_e=torch.tensor(counts, device=DEVICE))
        out.backward(upstream)
        weight.grad = None
        of_experts = zip(*(rows.detach().double().cpu().split(counts) for rows in (upstream, x)), strict=True)
        expected += torch.stack([upstream_RO.T @ x_RI for upstream_RO, x_RI in of_experts])
    return relative_error(main_grad.values.cpu(), expected)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU rounds the products of fp32 to tf32, and trains in bf16")
@pytest.mark.parametrize("counts", [[3, 130, 0, 128], [0, 0, 0, 0]])
@pytest.mark.parametrize(("num_in", "num_out"), [(72, 264), (128, 128)])
def test_weight_gradients_are_summed_in_main_grad(counts: list[int], num_in: int, num_out: int) -> None:
    assert error_of_sums(counts, num_in, num_out, torch.float32) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("counts", [[300, 0, 129, 1, 64, 2000], [0, 0]])
@pytest.mark.parametrize(("num_in", "num_out"), [(2048, 1024), (136, 200)])
def test_weight_gradients_are_summed_unrounded_on_a_gpu(counts: list[int], num_in: int, num_out: int) -> None:
    # Sums rounded to bf16 would be off by 2e-3.
    assert error_of_sums(counts, num_in, num_out, torch.bfloat16) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("counts", "num_in", "num_out"),
    [
        ([300, 0, 129, 1, 64, 2000], 2048, 1024),
        ([300, 0, 129, 1, 64, 2000], 512, 2048),
        ([5000, 3000], 2048, 1024),
        ([17, 400], 136, 200),
    ],
)
def test_triton_on_a_gpu(counts: list[int], num_in: int, num_out: int) -> None:
    check(grouped_matmul_case(random(), counts, num_in, num_out), torch.bfloat16)
    check(grouped_matmul_case(random(), counts, num_in, num_out, unused_rows=1000), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize(("num_in", "num_out"), [(2048, 1024), (512, 2048)])
def test_triton_on_a_gpu_gives_the_bits_of_torch(num_in: int, num_out: int) -> None:
    """Also of rows that two tiles compute."""
    from qwen3next_train.kernels.grouped_gemm import grouped_matmul_grouped_mm
    from qwen3next_train.kernels.triton.grouped_matmul import grouped_matmul_triton

    torch.manual_seed(0)
    counts_e = torch.tensor([1000, 0, 129, 77, 128, 2500], device=DEVICE)
    x = torch.randn(int(counts_e.sum()), num_in, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(6, num_out, num_in, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(x.shape[0], num_out, device=DEVICE, dtype=torch.bfloat16)
    results = []
    for kernel in (grouped_matmul_grouped_mm, grouped_matmul_triton, grouped_matmul_triton):
        out = kernel(x, weight, counts_e=counts_e)
        results.append((out.detach(), *torch.autograd.grad(out, (x, weight), upstream)))
    for repeat in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], repeat, strict=True))


@pytest.mark.gpu
def test_triton_with_more_than_two_to_the_31_elements() -> None:
    """Of the rows and of the weights; every product is looked at where it would be wrong first, at the end."""
    from qwen3next_train.kernels.triton.grouped_matmul import grouped_matmul_triton

    experts, num_in, num_out, rows = 4, 1024, 600_000, 4_000
    x = torch.zeros(rows, num_in, device=DEVICE, dtype=torch.bfloat16)
    x[:, 0] = torch.arange(rows, device=DEVICE) % 251
    weight = torch.zeros(experts, num_out, num_in, device=DEVICE, dtype=torch.bfloat16)
    weight[-1, -1, 0] = 1
    counts_e = torch.tensor([0, 1, 0, rows - 1], device=DEVICE)
    with torch.no_grad():
        out = grouped_matmul_triton(x, weight, counts_e=counts_e)
    assert torch.equal(out[1:, -1], x[1:, 0])
    assert not out[:, :-1].any()
    assert not out[0].any()
