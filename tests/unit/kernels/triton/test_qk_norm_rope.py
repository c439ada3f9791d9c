"""Triton q/k norm with rotary embedding against plain torch."""

from __future__ import annotations

import pytest
import torch

from qwen3next_train.selftest.mixer_cases import qk_norm_rope
from tests.unit.kernels.comparison import check, random, triton_kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "rotated"), [((5, 3, 32), 8), ((7, 2, 16), 16), ((1, 1, 24), 2), ((130, 1, 64), 16), ((3, 40, 48), 12)]
)
def test_output_and_gradients(dtype: torch.dtype, shape: tuple[int, int, int], rotated: int) -> None:
    check(qk_norm_rope(random(), *shape, rotated=rotated, columns=shape[2]), dtype)


def test_the_query_half_of_a_projection() -> None:
    check(qk_norm_rope(random(), 6, 4, 32, rotated=8, columns=64), torch.float32)


def test_no_tokens() -> None:
    case = qk_norm_rope(random(), 0, 2, 8, rotated=4, columns=8)
    inputs = {name: x.requires_grad_() for name, x in case.rounded(torch.float32).items()}
    (out,) = case.run(triton_kernels(), **inputs)
    out.sum().backward()
    assert out.shape == (0, 2, 8)
    assert inputs["weight_H"].grad is not None
    assert not inputs["weight_H"].grad.any()


def test_output_is_contiguous_whatever_the_input() -> None:
    case = qk_norm_rope(random(), 3, 4, 32, rotated=8, columns=64)
    (out,) = case.run(triton_kernels(), **case.rounded(torch.float32))
    assert out.is_contiguous()


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1001, 16384])
def test_at_the_model_s_size(num_tokens: int) -> None:
    check(qk_norm_rope(random(), num_tokens, 16, 256, rotated=64, columns=512), torch.bfloat16)
    check(qk_norm_rope(random(), num_tokens, 2, 256, rotated=64, columns=256), torch.bfloat16)
