"""The delta rule's inputs: Triton against plain torch."""

from __future__ import annotations

import math

import pytest
import torch

from qwen3next_train.errors import KernelUnavailable
from qwen3next_train.kernels.gdn_prologue import HeadShape
from qwen3next_train.kernels.varlen import VarlenMetadata
from qwen3next_train.selftest.case import Case
from qwen3next_train.selftest.mixer_cases import gdn_prologue
from tests.unit.kernels.comparison import check, random, triton_kernels
from tests.unit.kernels.interpreted import DEVICE

ONE_HEAD = HeadShape(1, 1, 4, 4)
MODEL_HEADS = HeadShape(16, 32, 128, 128)


def case_of(heads: HeadShape, lengths: tuple[int, ...], width: int = 4) -> Case:
    return gdn_prologue(random(), heads, VarlenMetadata.from_lengths(lengths, DEVICE), width)


@pytest.mark.parametrize(
    ("heads", "lengths", "width", "dtype"),
    [
        (HeadShape(1, 2, 8, 8), (5, 1, 11, 1, 2), 4, torch.float32),
        (HeadShape(2, 2, 4, 6), (6,), 3, torch.bfloat16),
        (HeadShape(1, 1, 5, 3), (1,), 2, torch.float32),
        (ONE_HEAD, (40,), 4, torch.float32),
        *((ONE_HEAD, (first, 12 - first), 4, torch.float32) for first in range(5, 9)),
    ],
)
def test_triton_equals_the_reference(
    heads: HeadShape, lengths: tuple[int, ...], width: int, dtype: torch.dtype
) -> None:
    """Documents shorter than the filter, cuts at every place of four, sizes that fill no vector."""
    check(case_of(heads, lengths, width), dtype)


@pytest.mark.parametrize("lengths", [(15, 1, 1, 5, 2), (35,), (13, 3, 8)])
def test_the_stretches_of_long_rows(lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts on both sides of a stretch's border."""
    from qwen3next_train.kernels.triton import gdn_prologue

    monkeypatch.setattr(gdn_prologue, "_FEW_TOKENS", 0)
    monkeypatch.setattr(gdn_prologue, "_BACKWARD_TOKENS", 16)
    check(case_of(ONE_HEAD, lengths), torch.float32)


def test_no_tokens() -> None:
    sequences = VarlenMetadata(*(torch.zeros(1, dtype=torch.int32, device=device) for device in (DEVICE, "cpu")))
    case = gdn_prologue(random(), HeadShape(1, 2, 4, 4), sequences, 4)
    inputs = {name: x.requires_grad_() for name, x in case.rounded(torch.float32).items()}
    out = case.run(triton_kernels(), **inputs)
    assert out[0].shape == (0, 1, 4)
    torch.stack([x.sum() for x in out]).sum().backward()
    assert all(x.grad is not None and not x.grad.any() for x in inputs.values())


def test_small_decays_keep_their_digits() -> None:
    """``softplus`` of -30 is 9e-14, far below the rounding error of 1."""
    case = case_of(ONE_HEAD, (3,))
    inputs = case.rounded(torch.float32) | {
        "ba_TM": torch.tensor([[0.0, -30.0], [0.0, -10.0], [0.0, 50.0]], device=DEVICE),
        "A_log_N": torch.zeros(1, device=DEVICE),
        "dt_bias_N": torch.zeros(1, device=DEVICE),
    }
    *_, g_TN, _ = case.run(triton_kernels(), **inputs)
    expected = [-math.log1p(math.exp(a)) for a in (-30.0, -10.0, 50.0)]
    assert g_TN.flatten().tolist() == pytest.approx(expected, rel=1e-6)


def test_what_is_beside_a_document_does_not_reach_it() -> None:
    """Not even an infinity."""
    case = case_of(ONE_HEAD, (5, 7))
    inputs = case.rounded(torch.float32)
    inputs["qkvz_TP"][:5] = float("inf")
    q_THK, k_THK, v_TNV, *_ = case.run(triton_kernels(), **inputs | {"qkvz_TP": inputs["qkvz_TP"].requires_grad_()})
    for x in (q_THK, k_THK, v_TNV):
        assert x[5:].isfinite().all()
    (gradient,) = torch.autograd.grad(v_TNV[5:].sum(), inputs["qkvz_TP"])
    assert gradient[5:].isfinite().all()


def test_a_wide_filter_is_refused_in_a_sentence() -> None:
    case = case_of(ONE_HEAD, (3,), width=5)
    with pytest.raises(
        KernelUnavailable, match=r"up to 4 wide and model\.linear_conv_kernel_dim is 5; choose 'reference'"
    ):
        case.run(triton_kernels(), **case.rounded(torch.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(1001,), (4096, 1, 2, 3, 4090, 17, 63, 64, 65, 3000), (1027, 2000, 2041)])
def test_at_the_model_s_size(lengths: tuple[int, ...]) -> None:
    check(case_of(MODEL_HEADS, lengths), torch.bfloat16)


@pytest.mark.gpu
def test_repeated_gradients_are_equal_bit_for_bit() -> None:
    case = case_of(MODEL_HEADS, (2500, 2501))
    inputs = {name: x.requires_grad_() for name, x in case.rounded(torch.bfloat16).items()}

    def gradients() -> tuple[torch.Tensor, ...]:
        out = case.run(triton_kernels(), **inputs)
        return torch.autograd.grad(sum(x.float().square().sum() for x in out), list(inputs.values()))

    first = gradients()
    for _ in range(2):
        assert all(torch.equal(x, y) for x, y in zip(first, gradients(), strict=True))
