"""The search for the fastest layouts: what it looks at, and that nothing it could look at is faster."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest

from qwen3next_train.accounting.hardware import find_device
from qwen3next_train.accounting.layout import MAX_DENSE_RANKS, Layout
from qwen3next_train.accounting.memory import memory_per_gpu, parameter_kinds
from qwen3next_train.config.load import load_config
from qwen3next_train.config.schema import Config, RecomputePart, TokenExchange
from qwen3next_train.config.validate import validate, validate_for_world, world_violations
from qwen3next_train.errors import ConfigError
from qwen3next_train.planner.layouts import CHEAP_PARTS, ZERO_STAGES, fits_device
from qwen3next_train.planner.report import format_plan
from qwen3next_train.planner.step_time import StepClock
from tests.integration.launching import REPOSITORY
from tests.unit.planner.configs import config_80b, planned, with_layout


def with_exchange(config: Config, exchange: TokenExchange) -> Config:
    return config.model_copy(update={"parallel": config.parallel.model_copy(update={"token_exchange": exchange})})


@pytest.mark.parametrize("given", ["exact", "auto", "dense"])
def test_experts_of_a_node_are_reached_by_the_faster_exchange(given: TokenExchange) -> None:
    """EP 8 on one node is faster with the dense exchange, whatever is set; where ``auto`` is, it stays for EP 4."""
    plan = planned(with_exchange(config_80b(zero_stage=3, recompute=["layer"]), given), gpus=16, gpu="h200")
    by_size = {each.layout.expert_parallel_size: each for each in reversed(plan.fastest)}
    assert by_size[8].layout.exchanges_densely
    assert by_size[8].layout.token_exchange == "dense"
    assert by_size[4].layout.exchanges_densely
    assert by_size[4].layout.token_exchange == ("auto" if given == "auto" else "dense")
    assert not any(each.layout.exchanges_densely for each in plan.fastest if each.layout.expert_parallel_size == 16)
    for each in plan.fastest:
        own = planned(with_layout(plan.config, each.layout), gpus=16, gpu="h200")
        assert own.step is not None
        assert own.step.total_s == each.step.total_s


def test_the_fastest_exchange_is_named_and_compared_with_the_exact_one() -> None:
    """Over more than four ranks its rates are those of four, which the plan says; over four it does not."""
    note = "dense over more than 4 ranks goes by the rates of 4, not measured; parallel.token_exchange auto stops there"
    path = REPOSITORY / "configs" / "qwen3next_80b_8xh200.yaml"
    config = load_config([path], [("parallel.token_exchange", "exact")]).config
    plan = planned(config, gpus=8, gpu="h200")
    assert plan.recommended is not None
    assert plan.step is not None
    best = plan.recommended.layout
    assert (best.expert_parallel_size, best.token_exchange) == (8, "dense")
    assert plan.recommended.step.total_s == pytest.approx(1.80, abs=0.005)
    assert plan.exact_exchange_s == plan.step.total_s == pytest.approx(1.98, abs=0.005)
    text = format_plan(plan)
    assert "take stage 1 with EP 8 and parallel.token_exchange dense: 1.8 s a step" in text
    assert ", parallel.token_exchange exact 10% more" in text
    assert note in text
    rows = [line.split() for line in text.splitlines()]
    head = next(row for row in rows if row[0] == "fastest")
    assert "exchange" in head
    assert rows[rows.index(head) + 1][6] == "dense"
    as_shipped = planned(load_config([path], []).config, gpus=8, gpu="h200")
    assert as_shipped.recommended == plan.recommended
    assert "take stage 1 with EP 8: 1.8 s a step" in format_plan(as_shipped)
    four = load_config([path], [("parallel.expert_parallel_size", "4"), ("model.num_hidden_layers", "12")]).config
    few = four.model_copy(update={"model": four.model.model_copy(update={"num_experts": 64})})
    assert max(each.layout.expert_parallel_size for each in planned(few, gpus=8, gpu="h200").fastest) == MAX_DENSE_RANKS
    assert note not in format_plan(planned(few, gpus=8, gpu="h200"))


@pytest.mark.parametrize("gpu", ["h200", "h200-nvl", "gb200"])
@pytest.mark.parametrize("gpus", [6, 8, 16, 72])
def test_no_dense_exchange_between_nodes_is_proposed(gpus: int, gpu: str) -> None:
    """All ranks of a group are in one domain of fast links, or all of the run are."""
    config = config_80b(expert_parallel_size=1, global_batch_size=gpus)
    config = config.model_copy(update={"model": config.model.model_copy(update={"num_experts": 144})})
    plan = planned(config, gpus=gpus, gpu=gpu)
    assert plan.device is not None
    for layout in (*(each.layout for each in plan.fastest), *plan.changes):
        groups = range(0, layout.world_size, layout.expert_parallel_size)
        domains = {
            first: {rank // plan.device.domain_size for rank in range(first, first + layout.expert_parallel_size)}
            for first in groups
        }
        assert not layout.exchanges_densely or {len(found) for found in domains.values()} == {1}


def test_on_one_node_three_ranks_may_share_experts_densely() -> None:
    """Six GPUs are one node although nodes are of eight; over twelve a group of three may lie on two."""
    layout = Layout(6, 3, 1, "bf16", 1, 16, token_exchange="auto")
    assert layout.exchanges_densely
    assert not replace(layout, world_size=12).exchanges_densely


def test_rows_need_not_be_shared_as_widely_as_given() -> None:
    """Sharing rows of 128k over 16 ranks works, over fewer it is faster."""
    config = config_80b(
        sequence_length=131_072, context_parallel_size=16, expert_parallel_size=16, global_batch_size=16, zero_stage=2
    )
    plan = planned(config, gpus=16, gpu="h200")
    assert plan.fastest
    assert {each.layout.context_parallel_size for each in plan.fastest} <= {1, 2, 4, 8}
    # What is proposed for want of room is never less of what saves memory.
    assert all(layout.context_parallel_size == 16 for layout in planned(config, gpus=16, gpu="h100").changes)


def brute_force(config: Config, gpus: int, gpu: str) -> float:
    """Seconds of the fastest step of all that the rules accept, fits, and is within what decision 0019 looks at."""
    device = find_device(gpu)
    assert device is not None
    kinds = parameter_kinds(config.model)
    clock = StepClock(config, device, kinds)
    given = Layout.of(config, gpus, ranks_per_node=device.domain_size)
    looked_at = list(every_layout(config, given))
    by_time = sorted((clock.step(layout).total_s, index) for index, layout in enumerate(looked_at))
    return next(
        seconds
        for seconds, index in by_time
        if not world_violations(with_layout(config, looked_at[index]), gpus)
        and not validate(with_layout(config, looked_at[index]))
        and fits_device(sum(memory_per_gpu(config.model, looked_at[index], kinds=kinds).values()), device)
    )


def every_layout(config: Config, given: Layout) -> Iterator[Layout]:
    """Those that are looked at, of every combination."""
    sizes = [size for size in range(1, given.world_size + 1) if given.world_size % size == 0]
    exchanges: tuple[TokenExchange, ...] = ("exact", "dense")
    parts: tuple[tuple[RecomputePart, ...], ...] = ((), CHEAP_PARTS, ("layer",))
    for expert, context, tensor, micro, exchange in product(sizes, sizes, sizes, range(1, 33), exchanges):
        shared = replace(
            given,
            expert_parallel_size=expert,
            context_parallel_size=context,
            tensor_parallel_size=tensor,
            micro_batch_size=micro,
            token_exchange=exchange,
        )
        if not _is_looked_at(config, given, shared):
            continue
        for zero, in_flight, recompute in product(ZERO_STAGES, (1, 2), parts):
            yield replace(shared, zero_stage=zero, micro_batches_in_flight=in_flight, recompute=frozenset(recompute))


def _is_looked_at(config: Config, given: Layout, layout: Layout) -> bool:
    """No batch left over, eight experts a rank, dense inside a node, slices that are long enough."""
    rows_of_step = layout.data_parallel_size * layout.micro_batch_size
    if layout.world_size % layout.ranks_per_row or config.run.global_batch_size % rows_of_step:
        return False
    experts = config.model.num_experts / layout.expert_parallel_size
    if layout.expert_parallel_size > 1 and experts < 8:
        return False
    if layout.exchanges_densely and not layout.shares_experts_in_a_node:
        return False
    slices = layout.ranks_per_row
    return slices in (1, given.ranks_per_row) or given.sequence_length // slices >= 4096


@pytest.mark.parametrize(
    ("gpus", "gpu", "config"),
    [
        (8, "h200", config_80b(global_batch_size=24, micro_batch_size=3)),
        (16, "h200", config_80b(global_batch_size=32, sequence_length=32_768, expert_parallel_size=16)),
        (16, "h200", config_80b(global_batch_size=16, sequence_length=131_072, context_parallel_size=16)),
        (4, "h200-nvl", config_80b(global_batch_size=24, expert_parallel_size=2)),
    ],
    ids=("one node", "32k", "128k over 16", "a small node"),
)
def test_nothing_that_could_be_proposed_is_faster(gpus: int, gpu: str, config: Config) -> None:
    """Against every combination, of twelve layers."""
    config = config.model_copy(
        update={
            "model": config.model.model_copy(
                update={"num_hidden_layers": 12, "layer_types": config.model.layer_types[:12]}
            )
        }
    )
    assert planned(config, gpus=gpus, gpu=gpu).fastest[0].step.total_s == pytest.approx(
        brute_force(config, gpus, gpu), rel=1e-12
    )


def _drawn(generator: random.Random) -> tuple[Config, int, str]:
    """A shipped configuration with settings, a number of GPUs and their kind; not all are accepted."""
    name = generator.choice(("qwen3next_tiny.yaml", "qwen3next_1b.yaml", "qwen3next_80b.yaml"))
    rows = (256, 4096) if name == "qwen3next_tiny.yaml" else (4096, 16_384, 24_576, 131_072, 262_144)
    gpus = generator.choice((1, 2, 3, 6, 8, 12, 16, 24, 64, 72, 256, 1024))
    context, tensor = generator.choice((1, 1, 2, 8, 16)), generator.choice((1, 1, 2, 4))
    micro_batch_size = generator.choice((1, 2, 3))
    rows_of_step = max(1, gpus // (context * tensor)) * micro_batch_size
    settings = {
        "run.global_batch_size": rows_of_step * generator.choice((1, 2, 3, 8)),
        "run.micro_batch_size": micro_batch_size,
        "data.sequence_length": generator.choice(rows),
        "parallel.expert_parallel_size": generator.choice((1, 2, 3, 4, 8, 16, 64)),
        "parallel.context_parallel_size": context,
        "parallel.tensor_parallel_size": tensor,
        "parallel.zero_stage": generator.choice((1, 2, 3)),
        "parallel.token_exchange": generator.choice(("exact", "auto", "dense")),
        "parallel.micro_batches_in_flight": generator.choice((1, 1, 2)),
        "parallel.recompute": generator.choice(("[]", "[norms]", "[layer]")),
        "parallel.gradient_dtype": generator.choice(("fp32", "fp32", "bf16")),
        "parallel.offload_optimizer": generator.choice(("none", "none", "cpu")),
    }
    overrides = [(key, str(value)) for key, value in settings.items()]
    config = load_config([REPOSITORY / "configs" / name], overrides).config
    validate_for_world(config, gpus)
    return config, gpus, generator.choice(("a100-80", "h100", "h200", "h200-nvl", "b200", "gb200"))


@pytest.mark.slow
def test_every_proposal_is_accepted_by_the_launcher() -> None:
    """What is named as fastest, or as a change that fits, is a configuration that starts on so many processes."""
    generator = random.Random(0)
    proposed = num_inputs = 0
    while num_inputs < 16:
        try:
            config, gpus, gpu = _drawn(generator)
        except ConfigError:
            continue
        num_inputs += 1
        plan = planned(config, gpus=gpus, gpu=gpu)
        for layout in (*plan.changes, *(each.layout for each in plan.fastest)):
            own = Config.model_validate(with_layout(config, layout).model_dump())
            assert validate(own) == []
            assert world_violations(own, layout.world_size) == []
            assert Layout.of(own, layout.world_size, ranks_per_node=layout.ranks_per_node) == layout
            proposed += 1
    assert proposed > 50
