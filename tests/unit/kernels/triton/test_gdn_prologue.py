"""The delta rule's inputs: Triton against plain torch."""

from __future__ import annotations

import math

import pytest
import torch

from qwen3next_train.errors import KernelUnavailable
from qwen3next_train.kernels.gdn_prologue import GdnPrologueOutputs, HeadShape, gdn_prologue_reference
from qwen3next_train.kernels.varlen import VarlenMetadata
from tests.unit.kernels.comparison import BOUNDS, errors
from tests.unit.kernels.interpreted import DEVICE
from tests.unit.kernels.projections import make_inputs

MODEL_HEADS = HeadShape(16, 32, 128, 128)


def triton(*inputs: torch.Tensor, heads: HeadShape, sequences: VarlenMetadata) -> GdnPrologueOutputs:
    # Not at the top: Triton is imported where its kernels are used.
    from qwen3next_train.kernels.triton.gdn_prologue import gdn_prologue_triton

    return gdn_prologue_triton(*inputs, heads=heads, sequences=sequences)


def check(heads: HeadShape, lengths: tuple[int, ...], width: int, dtype: torch.dtype) -> None:
    sequences = VarlenMetadata.from_lengths(lengths, DEVICE)
    found = errors(
        lambda *inputs: triton(*inputs, heads=heads, sequences=sequences),
        lambda *inputs: gdn_prologue_reference(*inputs, heads=heads, sequences=sequences),
        make_inputs(heads, sum(lengths), width, dtype),
    )
    assert max(found) < BOUNDS[dtype], found


@pytest.mark.parametrize(
    ("heads", "lengths", "width", "dtype"),
    [
        (HeadShape(1, 2, 8, 8), (5, 1, 11, 1, 2), 4, torch.float32),
        (HeadShape(2, 2, 4, 6), (6,), 3, torch.bfloat16),
        (HeadShape(1, 1, 5, 3), (1,), 2, torch.float32),
        (HeadShape(1, 1, 4, 4), (40,), 4, torch.float32),
        *((HeadShape(1, 1, 4, 4), (first, 24 - first), 4, torch.float32) for first in range(5, 12)),
    ],
)
def test_triton_equals_the_reference(
    heads: HeadShape, lengths: tuple[int, ...], width: int, dtype: torch.dtype
) -> None:
    """Documents shorter than the filter, cuts at every place of four, sizes that fill no vector."""
    check(heads, lengths, width, dtype)


@pytest.mark.parametrize("lengths", [(31, 1, 1, 5, 34), (71,), (29, 3, 31)])
def test_the_stretches_of_long_rows(lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts on both sides of a stretch's border."""
    from qwen3next_train.kernels.triton import gdn_prologue

    monkeypatch.setattr(gdn_prologue, "_FEW_TOKENS", 0)
    monkeypatch.setattr(gdn_prologue, "_BACKWARD_TOKENS", 32)
    check(HeadShape(1, 1, 4, 4), lengths, 4, torch.float32)


def test_no_tokens() -> None:
    heads = HeadShape(1, 2, 4, 4)
    inputs = [x.requires_grad_() for x in make_inputs(heads, 0, 4, torch.float32)]
    sequences = VarlenMetadata(*(torch.zeros(1, dtype=torch.int32, device=device) for device in (DEVICE, "cpu")))
    out = triton(*inputs, heads=heads, sequences=sequences)
    assert out.q_THK.shape == (0, 1, 4)
    sum(x.sum() for x in out).backward()
    assert all(x.grad is not None and not x.grad.any() for x in inputs)


def test_small_decays_keep_their_digits() -> None:
    """``softplus`` of -30 is 9e-14, far below the rounding error of 1."""
    heads = HeadShape(1, 1, 4, 4)
    inputs = make_inputs(heads, 3, 4, torch.float32)
    inputs[1] = torch.tensor([[0.0, -30.0], [0.0, -10.0], [0.0, 50.0]], device=DEVICE)
    inputs[3:] = [torch.zeros(1, device=DEVICE), torch.zeros(1, device=DEVICE)]
    g = triton(*inputs, heads=heads, sequences=VarlenMetadata.from_lengths((3,), DEVICE)).g_TN.flatten().tolist()
    expected = [-math.log1p(math.exp(a)) for a in (-30.0, -10.0, 50.0)]
    assert g == pytest.approx(expected, rel=1e-6)


def test_what_is_beside_a_document_does_not_reach_it() -> None:
    """Not even an infinity."""
    heads = HeadShape(1, 1, 4, 4)
    inputs = make_inputs(heads, 12, 4, torch.float32)
    inputs[0][:5] = float("inf")
    inputs[0].requires_grad_()
    out = triton(*inputs, heads=heads, sequences=VarlenMetadata.from_lengths((5, 7), DEVICE))
    for x in (out.q_THK, out.k_THK, out.v_TNV):
        assert x[5:].isfinite().all()
    (gradient,) = torch.autograd.grad(out.v_TNV[5:].sum(), inputs[0])
    assert gradient[5:].isfinite().all()


def test_a_wide_filter_is_refused_in_a_sentence() -> None:
    heads = HeadShape(1, 1, 4, 4)
    with pytest.raises(
        KernelUnavailable, match=r"up to 4 wide and model\.linear_conv_kernel_dim is 5; choose 'reference'"
    ):
        triton(
            *make_inputs(heads, 3, 5, torch.float32), heads=heads, sequences=VarlenMetadata.from_lengths((3,), DEVICE)
        )


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(1001,), (4096, 1, 2, 3, 4090, 17, 63, 64, 65, 3000), (1027, 2000, 2041)])
def test_at_the_model_s_size(lengths: tuple[int, ...]) -> None:
    check(MODEL_HEADS, lengths, 4, torch.bfloat16)


@pytest.mark.gpu
def test_repeated_gradients_are_equal_bit_for_bit() -> None:
    sequences = VarlenMetadata.from_lengths((2500, 2501), DEVICE)
    inputs = [x.requires_grad_() for x in make_inputs(MODEL_HEADS, 5001, 4, torch.bfloat16)]

    def gradients() -> tuple[torch.Tensor, ...]:
        out = triton(*inputs, heads=MODEL_HEADS, sequences=sequences)
        return torch.autograd.grad(sum(x.float().square().sum() for x in out), inputs)

    first = gradients()
    for _ in range(2):
        assert all(torch.equal(x, y) for x, y in zip(first, gradients(), strict=True))
