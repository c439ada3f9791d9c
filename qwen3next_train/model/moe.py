"""Mixture of experts: fp32 router, routed experts, gated shared expert.

Letters: T tokens, D hidden, E experts, e local experts, K experts per token, F expert hidden, R routed rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from qwen3next_train.config.schema import ModelConfig
from qwen3next_train.kernels.grouped_matmul import GroupedMatmul
from qwen3next_train.kernels.selection import KernelSet
from qwen3next_train.model.dispatch import LocalDispatcher, TokenDispatcher
from qwen3next_train.model.norms import at_least_fp32
from qwen3next_train.model.router_losses import RouterStats, router_stats


class TopKRouter(nn.Module):
    """Softmax over all experts in fp32, then the K largest (HF module name ``mlp.gate``).

    Args:
        config: model section.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
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
        wide_TD = at_least_fp32(x_TD)
        logits_TE = F.linear(wide_TD, self.weight.to(wide_TD.dtype))
        probs_TE = logits_TE.softmax(-1)
        weights_TK, ids_TK = probs_TE.topk(self.top_k, dim=-1)
        if self.renormalize:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        stats = router_stats(logits_TE, probs_TE, ids_TK, num_rows=num_rows, with_z_grad=self.with_z_grad)
        return weights_TK, ids_TK, stats


class RoutedExperts(nn.Module):
    """SwiGLU experts of this rank, stacked: ``gate_up_proj`` ``[e, 2F, D]``, ``down_proj`` ``[e, D, F]``.

    Args:
        config: model section.
        kernel: selected grouped matrix product.
        num_local: e.
    """

    def __init__(self, config: ModelConfig, kernel: GroupedMatmul, num_local: int) -> None:
        super().__init__()
        hidden, ffn = config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(num_local, 2 * ffn, hidden))
        self.down_proj = nn.Parameter(torch.empty(num_local, hidden, ffn))
        self.kernel = kernel

    def forward(self, rows_RD: torch.Tensor, counts_e: torch.Tensor) -> torch.Tensor:
        """Rows sorted by expert ``[R, D]`` to the experts' outputs ``[R, D]``; R may be 0."""
        gate_RF, up_RF = self.kernel(rows_RD, self.gate_up_proj, counts_e=counts_e).chunk(2, dim=-1)
        return self.kernel(F.silu(gate_RF) * up_RF, self.down_proj, counts_e=counts_e)


class SharedExpert(nn.Module):
    """SwiGLU block that every token passes.

    Args:
        hidden: D.
        ffn: hidden width.
    """

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, ffn, bias=False)
        self.up_proj = nn.Linear(hidden, ffn, bias=False)
        self.down_proj = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """``[T, D]`` to ``[T, D]``."""
        return self.down_proj(F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))


class SparseMoeBlock(nn.Module):
    """Router, routed experts and shared expert of one layer.

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
        self.gate = TopKRouter(config)
        self.experts = RoutedExperts(config, kernels.grouped_matmul, len(local_experts))
        self.shared_expert = SharedExpert(config.hidden_size, shared) if shared else None
        has_gate = bool(shared) and config.shared_expert_gate
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False) if has_gate else None
        self.dispatcher: TokenDispatcher = LocalDispatcher(config.num_experts, kernels.token_permutation)

    def forward(self, x_TD: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, RouterStats]:
        """``[T, D]`` of ``num_rows`` rows to ``[T, D]`` and the router's statistics."""
        weights_TK, ids_TK, stats = self.gate(x_TD, num_rows)
        sent = self.dispatcher.send(x_TD, ids_TK, weights_TK)
        shared_TD = self._shared(x_TD)
        received = self.dispatcher.receive(sent)
        y_TD = self.dispatcher.combine(self.experts(received.rows_RD, received.counts_e), received)
        return (y_TD if shared_TD is None else y_TD + shared_TD), stats

    def _shared(self, x_TD: torch.Tensor) -> torch.Tensor | None:
        if self.shared_expert is None:
            return None
        shared_TD = self.shared_expert(x_TD)
        if self.shared_expert_gate is not None:
            shared_TD = shared_TD * self.shared_expert_gate(x_TD).sigmoid()
        return shared_TD
