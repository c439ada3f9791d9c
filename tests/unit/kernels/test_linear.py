"""Linear layers and the embedding with gradients that are added where they are summed, against autograd's own."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qwen3next_train.kernels.linear import Embedding, Linear, linear
from qwen3next_train.kernels.main_grad import MainGrad

DTYPES = [
    pytest.param(torch.float32, torch.float32, id="fp32"),
    pytest.param(torch.bfloat16, torch.float32, id="bf16"),
    pytest.param(torch.bfloat16, torch.bfloat16, id="bf16-gradients"),
]


def test_without_a_main_grad_they_are_torchs_own() -> None:
    generator = torch.Generator().manual_seed(1)
    x, first, second = (torch.randn(*shape, generator=generator) for shape in ((5, 8), (3, 8), (4, 8)))
    assert torch.equal(linear(x, first, second), F.linear(x, torch.cat((first, second))))
    layer, table, ids = Linear(8, 3), Embedding(7, 8), torch.tensor([1, 6, 1])
    assert torch.equal(layer(x), F.linear(x, layer.weight))
    nn.init.normal_(table.weight)
    assert torch.equal(table(ids), F.embedding(ids, table.weight))
    table(ids).sum().backward()
    assert table.weight.grad is not None
    assert table.weight.grad[:, 0].tolist() == [0, 2, 0, 0, 0, 0, 1]


@pytest.mark.parametrize(("dtype", "gradient_dtype"), DTYPES)
def test_gradients_of_several_uses_and_passes_are_summed_in_the_buffer(
    dtype: torch.dtype, gradient_dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(2)
    weights = [nn.Parameter(torch.randn(size, 8, generator=generator).to(dtype)) for size in (3, 4)]
    for weight in weights:
        weight.main_grad = MainGrad(torch.full(weight.shape, math.nan, dtype=gradient_dtype))
        # As the buckets do it: the hook runs once a backward pass, whatever the number of uses.
        weight.register_post_accumulate_grad_hook(lambda p: p.main_grad.add(p.grad))
    expected = [torch.zeros(weight.shape, dtype=torch.float64) for weight in weights]
    for _ in range(2):
        inputs = [torch.randn(6, 8, generator=generator).to(dtype).requires_grad_() for _ in range(2)]
        factors = [torch.randn(6, 7, generator=generator).to(dtype) for _ in range(2)]
        sum((linear(x, *weights) * f).sum() for x, f in zip(inputs, factors, strict=True)).backward()
        for x, factor in zip(inputs, factors, strict=True):
            joined = torch.cat([weight.detach() for weight in weights])
            assert x.grad is not None
            torch.testing.assert_close(x.grad, factor @ joined)
            for total, side in zip(expected, factor.split((3, 4), dim=1), strict=True):
                total += side.double().t() @ x.detach().double()
        for weight in weights:
            weight.grad = None
    tolerance = 1e-6 if gradient_dtype == torch.float32 else 2e-2
    for weight, total in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.main_grad.values.double(), total, rtol=tolerance, atol=tolerance * 4)


@pytest.mark.parametrize(("dtype", "gradient_dtype"), DTYPES)
def test_embedding_sums_equal_tokens_unrounded(dtype: torch.dtype, gradient_dtype: torch.dtype) -> None:
    table = Embedding(5, 4)
    table.weight.data = torch.randn(5, 4, generator=torch.Generator().manual_seed(3)).to(dtype)
    table.weight.main_grad = MainGrad(torch.full((5, 4), math.nan, dtype=gradient_dtype))
    ids = torch.tensor([3] * 600 + [0])
    for _ in range(2):
        rows = table(ids)
        assert torch.equal(rows, table.weight[ids])
        rows.sum().backward()
        table.weight.main_grad.add(table.weight.grad)
    # 1,200 ones: a sum in bf16 would stop at 256; its last rounding here keeps 8 bits.
    expected = 1200.0 if gradient_dtype == torch.float32 else float(torch.tensor(1200.0, dtype=torch.bfloat16))
    assert table.weight.main_grad.values[:, 0].tolist() == [2, 0, 0, expected, 0]


def test_a_weight_that_needs_no_gradient_gets_none() -> None:
    layer = Linear(4, 2).requires_grad_(False)
    layer.weight.main_grad = MainGrad(torch.full((2, 4), math.nan))
    x = torch.ones(3, 4, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.main_grad.is_empty
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0], layer.weight.sum(0))
