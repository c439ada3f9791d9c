"""Zero-centred RMSNorm and fused add + RMSNorm by Triton kernels: one pass forward, one pass backward.

The backward computes the root mean square again, since it reads the input anyway; its programs each sum the weight's
gradient over their rows, and the partial sums are added up in a fixed order. The gradient of an input that is passed on
or of a residual sum is added in fp32 before the one rounding, where plain torch rounds both summands first.

Saved for the backward pass: the input (of ``fused_add_rms_norm`` the sum) and the weight.

Letters: T tokens, R rows, D hidden, G programs of the backward pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwen3next_train.kernels.norms import RmsNorm
from qwen3next_train.kernels.triton.row_programs import dense_rows, next_power_of_2, num_row_programs, row_warps


class RmsNormTriton(RmsNorm):
    """Each method is one kernel each way; statistics, products and sums of gradients are fp32."""

    def normalize(self, x: torch.Tensor, weight_D: torch.Tensor, *, eps: float) -> torch.Tensor:
        """Rows may lie apart; they are copied if they are not dense themselves."""
        return _Normalize.apply(x, weight_D, eps)

    def rms_norm_with_residual(
        self, x_TD: torch.Tensor, weight_D: torch.Tensor, *, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradient that came to ``x`` itself is added inside the norm's backward kernel, in fp32."""
        return _PassAndNormalize.apply(x_TD, weight_D, eps)

    def fused_add_rms_norm(
        self, x_TD: torch.Tensor, y_TD: torch.Tensor, weight_D: torch.Tensor, *, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum's two gradients are added in fp32 and handed on to both summands as one tensor."""
        return _AddAndNormalize.apply(x_TD, y_TD, weight_D, eps)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_D, eps):
        x_RD = dense_rows(x)
        ctx.save_for_backward(x, weight_D)
        ctx.eps = eps
        normed_RD = torch.empty(x_RD.shape, dtype=x.dtype, device=x.device)
        _launch_forward(x_RD, None, weight_D, None, normed_RD, eps)
        return normed_RD.view(x.shape)

    @staticmethod
    def backward(ctx, grad):
        x, weight_D = ctx.saved_tensors
        grad_RD, grad_D = _launch_backward(dense_rows(x), weight_D, dense_rows(grad), None, ctx.eps)
        return grad_RD.view(x.shape), grad_D, None


class _PassAndNormalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, weight_D, eps):
        # No zeros for what nobody used.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x_TD, weight_D)
        ctx.eps = eps
        normed_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
        _launch_forward(dense_rows(x_TD), None, weight_D, None, normed_TD, eps)
        return x_TD.view_as(x_TD), normed_TD

    @staticmethod
    def backward(ctx, grad_passed_TD, grad_normed_TD):
        x_TD, weight_D = ctx.saved_tensors
        return *_both_gradients(dense_rows(x_TD), weight_D, grad_passed_TD, grad_normed_TD, ctx.eps), None


class _AddAndNormalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, y_TD, weight_D, eps):
        ctx.set_materialize_grads(False)
        x_TD, y_TD = dense_rows(x_TD), dense_rows(y_TD)
        sum_TD, normed_TD = (torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device) for _ in range(2))
        _launch_forward(x_TD, y_TD, weight_D, sum_TD, normed_TD, eps)
        ctx.save_for_backward(sum_TD, weight_D)
        ctx.eps = eps
        return sum_TD, normed_TD

    @staticmethod
    def backward(ctx, grad_sum_TD, grad_normed_TD):
        sum_TD, weight_D = ctx.saved_tensors
        grad_TD, grad_D = _both_gradients(sum_TD, weight_D, grad_sum_TD, grad_normed_TD, ctx.eps)
        return grad_TD, grad_TD, grad_D, None


def _both_gradients(
    x_TD: torch.Tensor,
    weight_D: torch.Tensor,
    grad_passed_TD: torch.Tensor | None,
    grad_normed_TD: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of ``x``, handed out beside its norm, and of the weight; each output may have been left unused."""
    if grad_normed_TD is None:
        return grad_passed_TD, None
    passed_TD = None if grad_passed_TD is None else dense_rows(grad_passed_TD)
    return _launch_backward(x_TD, weight_D, dense_rows(grad_normed_TD), passed_TD, eps)


def _launch_forward(
    x_RD: torch.Tensor,
    y_RD: torch.Tensor | None,
    weight_D: torch.Tensor,
    sum_RD: torch.Tensor | None,
    normed_RD: torch.Tensor,
    eps: float,
) -> None:
    num_rows, size = x_RD.shape
    if num_rows == 0:
        return
    block = next_power_of_2(size)
    _forward[(num_rows,)](
        x_RD,
        y_RD,
        weight_D,
        sum_RD,
        normed_RD,
        x_RD.stride(0),
        0 if y_RD is None else y_RD.stride(0),
        eps,
        SIZE=size,
        BLOCK=block,
        WITH_SUM=y_RD is not None,
        num_warps=row_warps(block),
    )


def _launch_backward(
    x_RD: torch.Tensor, weight_D: torch.Tensor, grad_RD: torch.Tensor, residual_RD: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of input and weight; ``residual_RD`` is added to the former."""
    num_rows, size = x_RD.shape
    grad_x_RD = torch.empty(x_RD.shape, dtype=x_RD.dtype, device=x_RD.device)
    if num_rows == 0:
        return grad_x_RD, torch.zeros_like(weight_D)
    block = next_power_of_2(size)
    programs = num_row_programs(num_rows, x_RD.device)
    partial_GD = torch.empty(programs, size, dtype=torch.float32, device=x_RD.device)
    _backward[(programs,)](
        x_RD,
        weight_D,
        grad_RD,
        residual_RD,
        grad_x_RD,
        partial_GD,
        num_rows,
        x_RD.stride(0),
        grad_RD.stride(0),
        0 if residual_RD is None else residual_RD.stride(0),
        eps,
        SIZE=size,
        BLOCK=block,
        WITH_RESIDUAL=residual_RD is not None,
        num_warps=row_warps(block),
    )
    return grad_x_RD, partial_GD.sum(0).to(weight_D.dtype)


@triton.jit
def _forward(
    x_ptr,
    y_ptr,
    weight_ptr,
    sum_ptr,
    normed_ptr,
    x_stride,
    y_stride,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    WITH_SUM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0)
    if WITH_SUM:
        y = tl.load(y_ptr + row * y_stride + column, mask=inside, other=0.0)
        # Rounded like the sum that later layers see.
        x = (x.to(tl.float32) + y.to(tl.float32)).to(x_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * SIZE + column, x, mask=inside)
    x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / SIZE + eps)
    weight = 1.0 + tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed_ptr + row * SIZE + column, x * scale * weight, mask=inside)


@triton.jit
def _backward(
    x_ptr,
    weight_ptr,
    grad_ptr,
    residual_ptr,
    grad_x_ptr,
    partial_ptr,
    num_rows,
    x_stride,
    grad_stride,
    residual_stride,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    WITH_RESIDUAL: tl.constexpr,
):
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    weight = 1.0 + tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    grad_weight = tl.zeros([BLOCK], dtype=tl.float32)
    row = program.to(tl.int64)
    for _ in range(program, num_rows, tl.num_programs(0)):
        x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, axis=0) / SIZE + eps)
        normed = x * scale
        grad_weight += grad * normed
        grad = grad * weight
        grad_x = scale * (grad - normed * (tl.sum(grad * normed, axis=0) / SIZE))
        if WITH_RESIDUAL:
            place = residual_ptr + row * residual_stride + column
            grad_x += tl.load(place, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + row * SIZE + column, grad_x, mask=inside)
        row += tl.num_programs(0)
    tl.store(partial_ptr + program.to(tl.int64) * SIZE + column, grad_weight, mask=inside)
