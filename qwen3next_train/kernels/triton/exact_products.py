"""fp32-accurate products of bf16 activations with fp32 router weights, on bf16 tensor cores.

An fp32 number is the sum of three bf16 numbers (24 bits of mantissa are three times 8), and products of bf16 numbers
are exact in fp32, in which tensor cores add them up. So three bf16 products side by side give what an fp32 product
gives (a 3xBF16, or split-precision, GEMM), at several times its speed on GPUs whose fp32 units are slow; TF32 would
keep 11 bits of the weights.

The parts are stored one beside the other in an order in which each product finds its three factors in a row:
``_WEIGHT_ORDER`` for weights, ``GRAD_ORDER`` for gradients of logits.

Letters: T tokens, D hidden, E experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwen3next_train.kernels.triton.row_programs import ceil_div

NUM_PARTS = 3
"""Terms of a logit: its product with the low, the high and the middle part of the weights."""


def split_weight(weight_ED: torch.Tensor) -> torch.Tensor:
    """Parts (low, high, middle, high) of the weights, bf16 ``[4E, D]``."""
    weight_ED = weight_ED.contiguous()
    parts = torch.empty(4 * weight_ED.shape[0], weight_ED.shape[1], dtype=torch.bfloat16, device=weight_ED.device)
    size = weight_ED.numel()
    _split[(ceil_div(size, 1024),)](weight_ED, parts, size, BLOCK=1024)
    return parts


def logit_parts(x_TD: torch.Tensor, weight_ED: torch.Tensor) -> torch.Tensor:
    """The :data:`NUM_PARTS` terms of each logit side by side, fp32 ``[T, 3E]``; ``x_TD`` is bf16."""
    return _product(x_TD, split_weight(weight_ED)[: NUM_PARTS * weight_ED.shape[0]].t())


def grad_of_x(grad_T4E: torch.Tensor, weight_ED: torch.Tensor) -> torch.Tensor:
    """Gradient of x, rounded once to bf16: high high + high middle + middle high parts, exact to 16 bits.

    Args:
        grad_T4E: parts (high, high, middle, low) of the gradients of the logits, bf16 ``[T, 4E]``.
        weight_ED: the weights.
    """
    num_experts = weight_ED.shape[0]
    return grad_T4E[:, : 3 * num_experts] @ split_weight(weight_ED)[num_experts:]


def grad_of_weight(grad_T4E: torch.Tensor, x_TD: torch.Tensor) -> torch.Tensor:
    """Gradient of the weights, fp32 ``[E, D]``; ``grad_T4E`` as for :func:`grad_of_x`."""
    num_experts = grad_T4E.shape[1] // 4
    terms = _product(grad_T4E[:, num_experts:].t(), x_TD)
    return terms.view(3, num_experts, -1).sum(0)


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Product of two bf16 matrices, its sums and its result in fp32."""
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    # Torch has no such product for the CPU, on which these kernels are only tested.
    return left.float() @ right.float()


@triton.jit
def split_in_three(value):
    """High, middle and low bf16 part of fp32 values."""
    high = value.to(tl.bfloat16)
    rest = value - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _split(weight, parts, size, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    high, middle, low = split_in_three(tl.load(weight + place, mask=mask, other=0).to(tl.float32))
    tl.store(parts + place, low, mask=mask)
    tl.store(parts + size + place, high, mask=mask)
    tl.store(parts + 2 * size + place, middle, mask=mask)
    tl.store(parts + 3 * size + place, high, mask=mask)
