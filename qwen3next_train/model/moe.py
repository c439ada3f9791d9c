"""Mixture of experts: fp32 router, routed experts, gated shared expert.

Letters: T tokens, D hidden, E experts, e local experts, K experts per token, F expert hidden, R routed rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qwen3next_train.config.schema import ModelConfig
from qwen3next_train.kernels.gates import SharedExpertCombine, SwiGlu
from qwen3next_train.kernels.linear import Linear, linear
from qwen3next_train.kernels.routing import TopKRouting
from qwen3next_train.kernels.selection import KernelSet
from qwen3next_train.model.dispatch import LocalDispatcher, TokenDispatcher
from qwen3next_train.model.overlap import Stages, interleaved
from qwen3next_train.model.recompute import recomputed
from qwen3next_train.model.router_losses import RouterStats


class TopKRouter(nn.Module):
    """Softmax over all experts in fp32, then the K largest (HF module name ``mlp.gate``).

    Args:
        config: model section.
        kernel: selected routing.
    """

    def __init__(self, config: ModelConfig, kernel: TopKRouting) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.kernel = kernel
        self.top_k = config.num_experts_per_tok
        self.renormalize = config.norm_topk_prob
        self.with_z_grad = config.router_z_loss_coef > 0

    def forward(self, x_TD: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor, RouterStats]:
        """Route tokens.

        Args:
            x_TD: ``[T, D]``, any dtype.
            num_rows: rows the T tokens consist of.

        Returns:
            fp32 weights ``[T, K]``, int64 expert ids ``[T, K]``, statistics.
        """
        weights_TK, ids_TK, *stats = self.kernel(
            x_TD,
            self.weight,
            top_k=self.top_k,
            renormalize=self.renormalize,
            num_rows=num_rows,
            with_z_grad=self.with_z_grad,
        )
        return weights_TK, ids_TK, RouterStats(*stats)


class RoutedExperts(nn.Module):
    """SwiGLU experts of this rank, stacked: ``gate_up_proj`` ``[e, 2F, D]``, ``down_proj`` ``[e, D, F]``.

    Args:
        config: model section.
        kernels: selected backends.
        num_local: e.
    """

    def __init__(self, config: ModelConfig, kernels: KernelSet, num_local: int) -> None:
        super().__init__()
        hidden, ffn = config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(num_local, 2 * ffn, hidden))
        self.down_proj = nn.Parameter(torch.empty(num_local, hidden, ffn))
        self.product = kernels.grouped_matmul
        self.swiglu = kernels.swiglu

    def forward(self, rows_RD: torch.Tensor, weights_R: torch.Tensor, counts_e: torch.Tensor) -> torch.Tensor:
        """Rows sorted by expert ``[R, D]`` to the experts' outputs ``[R, D]`` times ``weights_R``; R may be 0."""
        gate_up = self.product(rows_RD, self.gate_up_proj, counts_e=counts_e)
        inner = recomputed("activations", self.swiglu, gate_up, weights_R)
        return self.product(inner, self.down_proj, counts_e=counts_e)


class SharedExpert(nn.Module):
    """SwiGLU block that every token passes.

    Args:
        hidden: D.
        ffn: hidden width.
        kernel: selected activation.
    """

    def __init__(self, hidden: int, ffn: int, kernel: SwiGlu) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, ffn)
        self.up_proj = Linear(hidden, ffn)
        self.down_proj = Linear(ffn, hidden)
        self.swiglu = kernel

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """``[T, D]`` to ``[T, D]``."""
        # One product instead of two: the gradient of x is then one as well, and no sum of two.
        gate_up = linear(x_TD, self.gate_proj.weight, self.up_proj.weight)
        return self.down_proj(recomputed("activations", self.swiglu, gate_up))


class SharedExpertGate(nn.Module):
    """Adds the shared expert's output, each token's scaled by the sigmoid of a logit, to residual and routed experts.

    Args:
        hidden: D.
        kernel: selected gated addition.
    """

    def __init__(self, hidden: int, kernel: SharedExpertCombine) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, hidden))
        self.kernel = kernel

    def forward(
        self, routed_TD: torch.Tensor, shared_TD: torch.Tensor, x_TD: torch.Tensor, *, residual_TD: torch.Tensor
    ) -> torch.Tensor:
        """``residual + (routed + shared * sigmoid(x @ weight^T))``, all ``[T, D]``."""
        return self.kernel(residual_TD, routed_TD, shared_TD, x_TD, self.weight)


class SparseMoeBlock(nn.Module):
    """The second half of a layer: ``residual + (routed experts + gate * shared expert)``.

    In order: tokens set off to other ranks, as far as that needs no routing; the router chooses K experts per token;
    the tokens arrive at their experts, which compute (grouped GEMM); their outputs travel back while the shared expert
    computes, and are summed per token; the gate weighs the shared expert, and one kernel adds all three terms.

    ``dispatcher`` is replaced from outside for expert parallelism; the block knows no process group.

    Args:
        config: model section.
        kernels: selected backends.
        local_experts: global ids of the experts this rank holds.
    """

    def __init__(self, config: ModelConfig, kernels: KernelSet, local_experts: range) -> None:
        # Not super(): a subclass may have a second nn.Module base whose constructor must not run.
        nn.Module.__init__(self)
        shared = config.shared_expert_intermediate_size
        self.gate = TopKRouter(config, kernels.top_k_routing)
        self.experts = RoutedExperts(config, kernels, len(local_experts))
        self.shared_expert = SharedExpert(config.hidden_size, shared, kernels.swiglu) if shared else None
        has_gate = bool(shared) and config.shared_expert_gate
        self.shared_expert_gate = (
            SharedExpertGate(config.hidden_size, kernels.shared_expert_combine) if has_gate else None
        )
        self.shared_input = kernels.shared_input
        self.dispatcher: TokenDispatcher = LocalDispatcher(config.num_experts, kernels.token_permutation)

    def forward(
        self, x_TD: torch.Tensor, num_rows: int, *, residual_TD: torch.Tensor
    ) -> tuple[torch.Tensor, RouterStats]:
        """``x = x + moe(norm(x))`` of the layer, given x and ``norm(x)``; args and result of :meth:`stages`."""
        (result,) = interleaved([self.stages(x_TD, num_rows, residual_TD=residual_TD)])
        return result

    def stages(
        self, x_TD: torch.Tensor, num_rows: int, *, residual_TD: torch.Tensor
    ) -> Stages[tuple[torch.Tensor, RouterStats]]:
        """The block on one micro-batch; other micro-batches may be advanced where it yields.

        Args:
            x_TD: ``norm(x)``, ``[T, D]``: read by router, routed experts, shared expert and its gate.
            num_rows: rows the T tokens consist of.
            residual_TD: x, ``[T, D]``. Added here and not by the layer: the kernel that adds routed and shared
                experts adds it in the same pass over memory.

        Returns:
            the new x, ``[T, D]``, and the router's statistics.
        """
        # Four readers of one tensor: their gradients are added by one kernel in the backward pass.
        to_router_TD, to_experts_TD, to_shared_TD, to_gate_TD = self.shared_input(x_TD, 4)
        begun = self.dispatcher.begin_dispatch(to_experts_TD)
        weights_TK, ids_TK, stats = self.gate(to_router_TD, num_rows)
        sent = self.dispatcher.send_choices(begun, ids_TK, weights_TK)
        yield  # Tokens travel.
        returning = self._routed(sent)
        yield  # The experts' outputs travel.
        shared_TD = None if self.shared_expert is None else self.shared_expert(to_shared_TD)
        y_TD = self.dispatcher.combine(returning)
        if shared_TD is None:
            return residual_TD + y_TD, stats
        if self.shared_expert_gate is None:
            return residual_TD + (y_TD + shared_TD), stats
        return self.shared_expert_gate(y_TD, shared_TD, to_gate_TD, residual_TD=residual_TD), stats

    def _routed(self, sent: Any) -> Any:
        """The routed experts' outputs, on their way back. A function, so that no variable keeps their rows."""
        received = self.dispatcher.dispatch(sent)
        rows_RD = self.experts(received.rows_RD, received.weights_R, received.counts_e)
        return self.dispatcher.begin_combine(rows_RD, received)
