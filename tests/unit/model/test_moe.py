"""Mixture of experts against a loop over tokens; experts without tokens; the dispatcher seam."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qwen3next_train.config.schema import ModelConfig
from qwen3next_train.kernels.routing import TokenPermutation
from qwen3next_train.kernels.selection import KernelSet
from qwen3next_train.model.dispatch import ExpertRows, LocalDispatcher
from qwen3next_train.model.moe import RoutedExperts, SparseMoeBlock
from qwen3next_train.model.overlap import interleaved
from tests.unit.model.small_models import cpu_kernels, small_config


def block_of(config: ModelConfig) -> SparseMoeBlock:
    """A block with random weights."""
    block = SparseMoeBlock(config, cpu_kernels(), range(config.num_experts))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return block


def token_by_token(block: SparseMoeBlock, config: ModelConfig, x_TD: torch.Tensor) -> torch.Tensor:
    """The definition: route, run, weigh and add for one token after the other."""
    rows = []
    for x in x_TD:
        probs = (block.gate.weight @ x).softmax(-1)
        weights, ids = probs.topk(config.num_experts_per_tok)
        if config.norm_topk_prob:
            weights = weights / weights.sum()
        y = torch.zeros_like(x)
        for weight, expert in zip(weights, ids.tolist(), strict=True):
            gate, up = (block.experts.gate_up_proj[expert] @ x).chunk(2)
            y = y + weight * (block.experts.down_proj[expert] @ (F.silu(gate) * up))
        if block.shared_expert is not None:
            shared = block.shared_expert(x)
            if block.shared_expert_gate is not None:
                shared = shared * (block.shared_expert_gate.weight @ x).sigmoid()
            y = y + shared
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_topk_prob": False, "num_experts_per_tok": 1},
        {"num_experts_per_tok": 6},
        {"shared_expert_gate": False},
        {"shared_expert_intermediate_size": 0},
    ],
)
def test_equals_the_definition_with_gradients(changes: dict[str, Any]) -> None:
    config = small_config(**changes)
    block = block_of(config)
    x = torch.randn(14, config.hidden_size, generator=torch.Generator().manual_seed(1)).requires_grad_()
    residual = torch.randn(14, config.hidden_size, generator=torch.Generator().manual_seed(3)).requires_grad_()
    leaves = [x, residual, *block.parameters()]
    value, expected = block(x, 2, residual_TD=residual)[0], residual + token_by_token(block, config, x)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(value.shape, generator=torch.Generator().manual_seed(2))
    for got, reference in zip(
        torch.autograd.grad(value, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(got, reference, rtol=1e-4, atol=1e-5)


def test_experts_without_tokens_get_a_zero_gradient() -> None:
    config = small_config(num_experts_per_tok=1)
    block = block_of(config)
    with torch.no_grad():
        block.gate.weight.zero_()
        block.gate.weight[3] = 1
    x = torch.rand(9, config.hidden_size)
    y, stats = block(x, 1, residual_TD=x)
    y.square().sum().backward()
    assert stats.counts_rE.tolist() == [[0, 0, 0, 9, 0, 0]]
    used = block.experts.down_proj.grad.abs().amax(dim=(1, 2)) > 0
    assert used.tolist() == [False, False, False, True, False, False]


def test_a_rank_without_any_row_still_gives_its_weights_a_gradient() -> None:
    config = small_config()
    experts = RoutedExperts(config, cpu_kernels(), 3)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.fill_(1)
    rows = torch.zeros(0, config.hidden_size, requires_grad=True)
    weights = torch.zeros(0, requires_grad=True)
    out = experts(rows, weights, torch.zeros(3, dtype=torch.int64))
    assert out.shape == (0, config.hidden_size)
    out.sum().backward()
    assert weights.grad is not None
    for parameter in experts.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_router_is_fp32_on_bf16_input() -> None:
    config = small_config()
    block = block_of(config)
    x = torch.randn(20, config.hidden_size).bfloat16()
    weights, ids, stats = block.gate(x, 1)
    exact = F.linear(x.double(), block.gate.weight.double()).softmax(-1)
    expected = exact.gather(1, ids)
    expected = expected / expected.sum(-1, keepdim=True)
    assert weights.dtype == stats.mean_prob_rE.dtype == torch.float32
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=0)


def test_another_dispatcher_can_take_the_seam() -> None:
    class Recorder:
        def __init__(self, inner: LocalDispatcher) -> None:
            self.inner, self.calls = inner, []  # type: ignore[var-annotated]

        def begin_dispatch(self, x_TD: torch.Tensor) -> Any:
            self.calls.append("begin_dispatch")
            return self.inner.begin_dispatch(x_TD)

        def send_choices(self, begun: Any, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> Any:
            self.calls.append("send_choices")
            return self.inner.send_choices(begun, expert_ids_TK, weights_TK)

        def dispatch(self, sent: Any) -> ExpertRows:
            self.calls.append("dispatch")
            return self.inner.dispatch(sent)

        def begin_combine(self, rows_RD: torch.Tensor, received: ExpertRows) -> Any:
            self.calls.append("begin_combine")
            return self.inner.begin_combine(rows_RD, received)

        def combine(self, begun: Any) -> torch.Tensor:
            self.calls.append("combine")
            return self.inner.combine(begun)

    config = small_config()
    block = block_of(config)
    x = torch.randn(6, config.hidden_size)
    expected = block(x, 1, residual_TD=x)[0]
    recorder = Recorder(LocalDispatcher(config.num_experts, TokenPermutation()))
    block.dispatcher = recorder
    block.gate.register_forward_pre_hook(lambda *_: recorder.calls.append("router"))
    block.shared_expert.register_forward_pre_hook(lambda *_: recorder.calls.append("shared expert"))
    assert torch.equal(block(x, 1, residual_TD=x)[0], expected)
    before = ["begin_dispatch", "router", "send_choices"]
    assert recorder.calls == [*before, "dispatch", "begin_combine", "shared expert", "combine"]
    # Of two micro-batches in flight both have sent all that they send before one waits for what arrives.
    recorder.calls.clear()
    interleaved([block.stages(x, 1, residual_TD=x) for _ in range(2)])
    assert recorder.calls[:7] == [*before, *before, "dispatch"]


def test_block_can_be_mixed_with_a_module_whose_constructor_must_not_run() -> None:
    class Foreign(nn.Module):
        def __init__(self) -> None:
            raise AssertionError("ran")

    class Mixed(SparseMoeBlock, Foreign):
        def __init__(self, config: ModelConfig, kernels: KernelSet, local_experts: range) -> None:
            SparseMoeBlock.__init__(self, config, kernels, local_experts)

    mixed = Mixed(small_config(), cpu_kernels(), range(2))
    assert isinstance(mixed, Foreign)
    assert mixed.experts.gate_up_proj.shape[0] == 2
