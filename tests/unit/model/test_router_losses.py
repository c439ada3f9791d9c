"""Router losses against their definitions written as loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch

from qwen3next_train.kernels.routing import route_logits
from qwen3next_train.model.router_losses import ExpertLoads, RouterStats, Summed, load_balancing_loss
from tests.unit.model.small_models import batch_of, build, scales_of, small_config

ROWS, TOKENS, EXPERTS, TOP_K = 3, 12, 5, 2


def decisions(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Router logits, probabilities and choices of one micro-batch."""
    logits = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    probs = logits.softmax(-1)
    return logits, probs, probs.topk(TOP_K).indices


def stats_of(seed: int) -> RouterStats:
    return statistics(decisions(seed)[0], num_rows=ROWS, with_z_grad=True)


def statistics(logits: torch.Tensor, *, num_rows: int, with_z_grad: bool) -> RouterStats:
    _, _, *stats = route_logits(logits, top_k=TOP_K, renormalize=True, num_rows=num_rows, with_z_grad=with_z_grad)
    return RouterStats(*stats)


def looped(probs: torch.Tensor, ids: torch.Tensor, counted: list[torch.Tensor]) -> float:
    """``sum_e f_e P_e``: P over ``probs``, f over the choices in ``counted``."""
    choices = [int(expert) for block in counted for expert in block.flatten()]
    loss = 0.0
    for expert in range(EXPERTS):
        fraction = choices.count(expert) / len(choices)
        loss += EXPERTS * fraction * float(probs[:, expert].mean())
    return loss


def identity(counts: torch.Tensor) -> torch.Tensor:
    return counts


def losses(
    loads: ExpertLoads, stats: list[RouterStats], total: Callable[[torch.Tensor], torch.Tensor] = identity
) -> torch.Tensor:
    """With ``total`` in place of a sum over ranks, of all layers but the last, then of the last."""
    counts = [loads.begin(part, lambda own: partial(total, own)) for part in (stats[:-1], stats[-1:]) if part]
    return loads.losses(stats, counts)


def test_sequence_scope_is_the_mean_over_rows() -> None:
    _, probs, ids = decisions(0)
    expected = 0.0
    for row in range(ROWS):
        span = slice(row * TOKENS // ROWS, (row + 1) * TOKENS // ROWS)
        expected += looped(probs[span], ids[span], [ids[span]]) / ROWS
    assert losses(ExpertLoads("sequence"), [stats_of(0)]).tolist() == pytest.approx([expected])


def test_micro_batch_scope_counts_over_ranks() -> None:
    _, probs, ids = decisions(0)
    other = stats_of(1)
    loads = ExpertLoads("micro_batch")
    for _ in range(2):
        loss = losses(loads, [stats_of(0)], lambda counts: counts + other.counts_rE.sum(0))
        assert loss.tolist() == pytest.approx([looped(probs, ids, [ids, decisions(1)[2]])])


def test_global_scope_also_counts_over_the_steps_micro_batches() -> None:
    loads = ExpertLoads("global")
    for _ in range(2):
        loads.begin_step()
        seen: list[torch.Tensor] = []
        for seed in range(3):
            _, probs, ids = decisions(seed)
            seen += [ids, ids]
            loss = losses(loads, [stats_of(seed)], lambda counts: 2 * counts)
            assert loss.tolist() == pytest.approx([looped(probs, ids, seen)])


def test_counts_may_be_reduced_in_place_without_touching_the_layers_own() -> None:
    stats = stats_of(0)
    own = stats.counts_rE.clone()
    loads = ExpertLoads("global")
    losses(loads, [stats], lambda counts: counts.mul_(2))
    losses(loads, [stats], lambda counts: counts.mul_(2))
    assert torch.equal(stats.counts_rE, own)


def test_layers_are_reduced_together_and_kept_apart() -> None:
    calls = []

    def reduce(counts: torch.Tensor) -> Summed:
        calls.append(counts.shape)
        return lambda: counts

    loads, stats = ExpertLoads("micro_batch"), [stats_of(0), stats_of(1)]
    both = loads.losses(stats, [loads.begin(stats, reduce)])
    assert calls == [(2, 1, EXPERTS)]
    alone = [losses(ExpertLoads("micro_batch"), [stats_of(seed)]) for seed in (0, 1)]
    torch.testing.assert_close(both, torch.cat(alone))
    assert torch.equal(losses(loads, stats), both)


def test_counts_travel_while_the_head_computes() -> None:
    model = build(small_config(router_aux_loss_scope="global"))
    batches = [batch_of([[9], [9]], seed=seed) for seed in (0, 1)]
    events = []

    def reduce(counts: torch.Tensor) -> Summed:
        events.append("begin")

        def finish() -> torch.Tensor:
            events.append("finish")
            return counts

        return finish

    model.reduce_counts = reduce
    model.lm_head.register_forward_pre_hook(lambda *_: events.append("head"))
    model.begin_step()
    model(batches, scales_of(batches[0]))
    # Of both micro-batches: of the layers, then of MTP's.
    assert events == 2 * ["begin", "begin", "head", "head"] + 4 * ["finish"]


def test_even_routing_costs_one_and_a_collapse_costs_the_number_of_experts() -> None:
    even = load_balancing_loss(torch.full((1, 1, EXPERTS), 1 / EXPERTS), torch.full((1, 1, EXPERTS), 7))
    assert even.item() == pytest.approx(1)
    collapsed = torch.tensor([[[1.0, 0, 0, 0, 0]]])
    assert load_balancing_loss(collapsed, (9 * collapsed).long()).item() == pytest.approx(EXPERTS)


def test_gradient_flows_through_the_probabilities_only() -> None:
    logits, probs, ids = decisions(0)
    stats = statistics(logits, num_rows=1, with_z_grad=False)
    losses(ExpertLoads("micro_batch"), [stats]).sum().backward()
    fractions = EXPERTS * torch.bincount(ids.flatten(), minlength=EXPERTS) / ids.numel()
    expected = probs * (fractions - (probs * fractions).sum(-1, keepdim=True)) / TOKENS
    torch.testing.assert_close(logits.grad, expected.detach())


def test_z_loss_and_entropy_equal_their_definitions() -> None:
    logits, probs, _ = decisions(0)
    stats = stats_of(0)
    z = sum(math.log(sum(math.exp(float(x)) for x in row)) ** 2 for row in logits) / TOKENS
    entropy = -sum(float(p) * math.log(float(p)) for row in probs for p in row) / TOKENS
    assert stats.z.item() == pytest.approx(z, rel=1e-5)
    assert stats.entropy.item() == pytest.approx(entropy, rel=1e-5)
    assert stats.z.requires_grad
    assert not stats.entropy.requires_grad


def test_the_model_forgets_counts_at_a_new_step() -> None:
    model = build(small_config(router_aux_loss_scope="global"))
    one, two = batch_of([[30, 3]], seed=1), batch_of([[33]], seed=2)
    values = []
    for batch in (one, two, "new step", two):
        if isinstance(batch, str):
            model.begin_step()
        else:
            values.append(model([batch], scales_of(batch))[0].aux_L)
    assert not torch.equal(values[1], values[2])
    model.begin_step()
    torch.testing.assert_close(model([two], scales_of(two))[0].aux_L, values[2], rtol=0, atol=0)
