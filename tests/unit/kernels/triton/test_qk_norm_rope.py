"""Triton q/k norm with rotary embedding against plain torch."""

from __future__ import annotations

import pytest
import torch

from qwen3next_train.kernels.norms import qk_norm_rope_reference
from qwen3next_train.kernels.triton.qk_norm_rope import qk_norm_rope_triton
from tests.unit.kernels.comparison import BOUNDS, errors
from tests.unit.kernels.interpreted import DEVICE

EPS = 1e-6


def angles(num_tokens: int, rotated: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines with the first half of the latter negated."""
    exponents = torch.arange(0, rotated, 2, device=DEVICE) / rotated
    angle = torch.arange(num_tokens, device=DEVICE).unsqueeze(1) * 1e4**-exponents
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=1).unsqueeze(1), torch.cat((-sin, sin), dim=1).unsqueeze(1)


def check(x: torch.Tensor, rotated: int) -> None:
    cos, sin = angles(x.shape[0], rotated)
    weight = torch.randn(x.shape[2], device=DEVICE, dtype=x.dtype) / 4
    found = errors(
        lambda x, w: qk_norm_rope_triton(x, w, cos, sin, eps=EPS),
        lambda x, w: qk_norm_rope_reference(x, w, cos.double(), sin.double(), eps=EPS),
        [x, weight],
    )
    assert max(found) < BOUNDS[x.dtype], found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "rotated"), [((5, 3, 32), 8), ((7, 2, 16), 16), ((1, 1, 24), 2), ((130, 1, 64), 16), ((3, 40, 48), 12)]
)
def test_output_and_gradients(dtype: torch.dtype, shape: tuple[int, int, int], rotated: int) -> None:
    torch.manual_seed(0)
    check(torch.randn(shape, device=DEVICE, dtype=dtype), rotated)


def test_the_query_half_of_a_projection() -> None:
    torch.manual_seed(0)
    check(torch.randn(6, 4, 64, device=DEVICE)[..., :32], 8)


def test_no_tokens() -> None:
    x, weight = torch.empty(0, 2, 8, device=DEVICE, requires_grad=True), torch.ones(8, device=DEVICE)
    out = qk_norm_rope_triton(x, weight.requires_grad_(), *angles(0, 4), eps=EPS)
    out.sum().backward()
    assert out.shape == (0, 2, 8)
    assert weight.grad is not None
    assert not weight.grad.any()


def test_output_is_contiguous_whatever_the_input() -> None:
    x = torch.randn(3, 4, 64, device=DEVICE)[..., :32]
    assert qk_norm_rope_triton(x, torch.zeros(32, device=DEVICE), *angles(3, 8), eps=EPS).is_contiguous()


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1001, 16384])
def test_at_the_model_s_size(num_tokens: int) -> None:
    torch.manual_seed(0)
    check(torch.randn(num_tokens, 16, 512, device=DEVICE, dtype=torch.bfloat16)[..., :256], 64)
    check(torch.randn(num_tokens, 2, 256, device=DEVICE, dtype=torch.bfloat16), 64)
