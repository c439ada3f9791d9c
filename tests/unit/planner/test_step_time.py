"""Predicted times of steps against measured ones, and the parts of a step by hand."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Literal

import pytest

from qwen3next_train.accounting.activations import ranks_per_token
from qwen3next_train.accounting.hardware import Device, find_device
from qwen3next_train.accounting.layout import Layout
from qwen3next_train.accounting.memory import parameter_kinds
from qwen3next_train.config.load import load_config
from qwen3next_train.config.presets import find_config
from qwen3next_train.config.schema import Config
from qwen3next_train.parameters import parameter_table
from qwen3next_train.planner.rates import LONG_ROW, rates_of
from qwen3next_train.planner.step_time import StepClock, StepTime
from tests.unit.accounting.shapes import QWEN3_NEXT_80B
from tests.unit.planner.configs import config_80b

ROWS = 4
"""Of a micro-batch in all rows of the records."""


def device(name: str) -> Device:
    found = find_device(name)
    assert found is not None
    return found


def bench(shape: str, **overrides: object) -> Config:
    return load_config(
        [find_config(f"bench_{shape}.yaml")], [(key.replace("__", "."), str(value)) for key, value in overrides.items()]
    ).config


def clock(config: Config, gpu: str = "h100", **rates: float) -> StepClock:
    kinds = parameter_kinds(config.model)
    return StepClock(config, device(gpu), kinds, rates=replace(rates_of(device(gpu), config.run.precision), **rates))


def step_80b(gpus: int, gpu: str = "h100", *, config: Config | None = None, **rates: float) -> StepTime:
    config = config_80b() if config is None else config
    return clock(config, gpu, **rates).step(Layout.of(config, gpus))


# GPUs, expert-parallel size, micro-batches, exchange, ZeRO stage; milliseconds a step.
MEASURED = [
    # docs/benchmarks/whole-steps.md, columns E and F.
    (1, 1, 1, "exact", 1, 146.7),
    (1, 1, 1, "exact", 1, 149.9),
    (1, 1, 4, "exact", 1, 532.5),
    (1, 1, 4, "exact", 1, 528.1),
    (4, 4, 1, "dense", 1, 166.0),
    (4, 4, 4, "dense", 1, 592.5),
    (4, 4, 4, "dense", 1, 590.1),
    # Columns C and D, before the last changes, which took 3 % of a step.
    (4, 4, 1, "exact", 1, 173.3),
    (4, 2, 4, "dense", 1, 624.4),
]


def slice4(
    gpus: int, expert_parallel_size: int, micro_batches: int, exchange: str, zero_stage: int, *, num_experts: int = 0
) -> Config:
    return bench(
        "slice4_e512",
        model__num_experts=num_experts or (128 if gpus == 1 else 512),
        parallel__expert_parallel_size=expert_parallel_size,
        parallel__zero_stage=zero_stage,
        parallel__token_exchange=exchange,
        run__global_batch_size=ROWS * micro_batches * gpus,
    )


# The same record, two H200, 128 experts a rank, dense exchange, four micro-batches: expert-parallel size, ZeRO stage,
# milliseconds.
MEASURED_H200 = [(2, 1, 529.1), (2, 1, 542.9), (1, 1, 519.5)]


@pytest.mark.parametrize(("size", "stage", "ms"), MEASURED_H200)
def test_measured_steps_of_two_h200(size: int, stage: int, ms: float) -> None:
    """Within 6 %; machines differ by 3 %."""
    config = slice4(2, size, 4, "dense", stage, num_experts=128 * size)
    predicted = 1e3 * clock(config, "h200").step(Layout.of(config, 2, ranks_per_node=2)).total_s
    assert predicted == pytest.approx(ms, rel=0.06)


# Four H200 of one host, in one call: expert-parallel size, ZeRO stage, milliseconds; the proxy took 507.2.
MEASURED_FOUR_H200 = [(4, 1, 578.6), (4, 1, 574.4), (4, 2, 583.3), (4, 3, 607.8), (2, 1, 590.2)]


@pytest.mark.parametrize(("size", "stage", "ms"), MEASURED_FOUR_H200)
def test_measured_steps_of_four_h200_against_their_proxy(size: int, stage: int, ms: float) -> None:
    """Within 4 % of the share; this machine's proxy took 3.6 % longer than predicted."""

    def seconds(gpus: int, size: int, stage: int) -> float:
        config = slice4(gpus, size, 4, "dense" if gpus > 1 else "exact", stage)
        return clock(config, "h200").step(Layout.of(config, gpus, ranks_per_node=gpus)).total_s

    assert seconds(4, size, stage) / seconds(1, 1, 1) == pytest.approx(ms / 507.2, rel=0.04)


# docs/benchmarks/long-context.md, four H200, twelve layers: thousands of tokens, context-parallel size, milliseconds.
MEASURED_LONG_ROWS = [
    (16, 1, 364.4),
    (64, 4, 556.5),
    (16, 1, 367.5),
    (32, 2, 448.6),
    (64, 4, 560.2),
    (32, 1, 810.2),
    (64, 2, 1077.1),
]


@pytest.mark.parametrize(("length", "size", "ms"), MEASURED_LONG_ROWS)
def test_measured_steps_of_long_rows(length: int, size: int, ms: float) -> None:
    """Within 3 %."""
    assert long_row_ms(length, size) == pytest.approx(ms, rel=0.03)


def test_the_longest_measured_row() -> None:
    """The same record: 3.04 % less than measured, since attention is slower at 128k than the table's rate."""
    assert long_row_ms(128, 4) == pytest.approx(0.9696 * 1538.6, rel=0.001)


@pytest.mark.parametrize(("length", "size", "ms"), [(16, 2, 260.9), (32, 4, 272.0), (16, 4, 312.7)])
def test_measured_steps_of_short_slices(length: int, size: int, ms: float) -> None:
    """The same record: their step waits for the host; the last, half as much work as the one before, took longer."""
    assert long_row_ms(length, size) == pytest.approx(ms, rel=0.15)


def long_row_ms(length: int, size: int) -> float:
    config = bench(
        "ep8_proxy",
        model__num_experts=256,
        parallel__expert_parallel_size=4,
        parallel__context_parallel_size=size,
        parallel__token_exchange="dense",
        parallel__recompute="[norms,activations,gdn_prologue]",
        parallel__gradient_dtype="bf16",
        optimizer__moments_dtype="bf16",
        data__sequence_length=1024 * length,
        run__micro_batch_size=1,
        run__global_batch_size=4 // size,
    )
    return 1e3 * clock(config, "h200").step(Layout.of(config, 4, ranks_per_node=4)).total_s


# docs/benchmarks/whole-steps.md, one H200: file, rows of a micro-batch, milliseconds of one.
MEASURED_SMALL = [
    ("qwen3next_tiny", 8, 21.0),
    ("qwen3next_20m", 16, 53.0),
    ("qwen3next_20m", 32, 68.0),
    ("qwen3next_100m", 8, 86.5),
    ("qwen3next_100m", 12, 110.0),
]


@pytest.mark.parametrize(("name", "rows", "ms"), MEASURED_SMALL)
def test_measured_micro_batches_that_wait_for_the_host(name: str, rows: int, ms: float) -> None:
    """Within 20 %: what a host needs for a layer differs by that between two minutes."""
    overrides = [("run.micro_batch_size", str(rows)), ("run.global_batch_size", str(rows))]
    config = load_config([find_config(f"{name}.yaml")], overrides).config
    step = clock(config, "h200").step(Layout.of(config, 1))
    assert 1e3 * step.total_s == pytest.approx(ms, rel=0.2)
    assert step.total_s > 1.1 * sum(s for part, s in step.by_part().items() if part != "idle")


def test_launches_by_hand() -> None:
    """Sixteen layers and an MTP depth, twice; what is computed again is launched again."""
    model = {"run__micro_batch_size": 1, "run__global_batch_size": 2, "data__sequence_length": 64}
    model |= {"model__num_hidden_layers": 16, "model__mtp_num_layers": 1}

    def launched_s(recompute: str) -> float:
        config = bench("ep8_proxy", **model, parallel__recompute=recompute)
        return clock(config, launch_layer_s=1.0).step(Layout.of(config, 1)).total_s

    assert launched_s("[]") == pytest.approx(2 * 17.0)
    assert launched_s("[layer]") == pytest.approx(2 * 17 * 1.4)
    assert launched_s("[norms,activations]") == pytest.approx(2 * 17 * 1.16)


@pytest.mark.parametrize(("gpus", "size", "micro_batches", "exchange", "stage", "ms"), MEASURED)
def test_measured_steps(gpus: int, size: int, micro_batches: int, exchange: str, stage: int, ms: float) -> None:
    """Within 4 % of what was measured."""
    config = slice4(gpus, size, micro_batches, exchange, stage)
    predicted = 1e3 * clock(config).step(Layout.of(config, gpus, ranks_per_node=gpus)).total_s
    assert predicted == pytest.approx(ms, rel=0.04)


@pytest.mark.parametrize(
    ("gpu", "recompute", "ms"),
    [
        ("h100", "[]", 260.3),
        ("h200", "[]", 243.2),
        ("h200", "[norms]", 246.9),
        ("h200", "[norms,activations,gdn_prologue]", 253.1),
        ("h200", "[layer]", 307.9),
    ],
)
def test_measured_micro_batches_of_three_times_the_layers(gpu: str, recompute: str, ms: float) -> None:
    """docs/benchmarks, FLA. No rate of an H100 is from this shape; of an H200 those of memory are."""
    config = bench("ep8_proxy", run__global_batch_size=ROWS, parallel__recompute=recompute)
    step = clock(config, gpu).step(Layout.of(config, 1))
    assert 1e3 * (step.model_s + step.recompute_s) == pytest.approx(ms, rel=0.03)


def test_parts_add_up() -> None:
    """One rank sends nothing and has no host optimizer; the names are those of the JSON object."""
    config = slice4(1, 1, 4, "exact", 1)
    step = clock(config).step(Layout.of(config, 1))
    assert step.exchange_s == step.reduction_s == step.host_s == step.recompute_s == 0
    assert step.total_s == pytest.approx(step.model_s + step.gradients_s + step.update_s + step.idle_s)
    assert step.by_part()["model"] == step.model_s


def test_every_rate_counts() -> None:
    """In a step of some of these layouts, or its row of the table would be there for nothing."""
    whole, parts = frozenset({"layer"}), frozenset({"norms", "activations", "gdn_prologue"})
    config, h100 = config_80b(), device("h100")
    kinds, table = parameter_kinds(config.model), rates_of(h100, "bf16")
    one = Layout.of(config, 16)
    node = replace(one, world_size=8, expert_parallel_size=2, token_exchange="dense")
    slices = replace(one, context_parallel_size=2, sequence_length=LONG_ROW)
    by_device = [
        replace(one, recompute=whole),
        replace(one, recompute=parts, token_exchange="dense"),
        replace(one, expert_parallel_size=2, micro_batches_in_flight=2),
        replace(one, offload_optimizer=True),
        replace(node, micro_batch_size=4),
        replace(node, zero_stage=3),
        slices,
    ]
    by_host = [replace(slices, recompute=whole), replace(slices, recompute=parts)]

    def times(**changed: float) -> list[float]:
        # What takes longer, the device or its host, is all that is seen.
        launches = {"launch_layer_s": 0.0, "launch_slices_s": 0.0}, {"launch_layer_s": 10.0}
        found = []
        for layouts, given in zip((by_device, by_host), launches, strict=True):
            timer = StepClock(config, h100, kinds, rates=replace(table, **{**given, **changed}))
            found += [timer.step(layout).total_s for layout in layouts]
        return found

    before, rates = times(), asdict(table)
    assert not rates.pop("is_estimate")
    assert [name for name, rate in rates.items() if times(**{name: 1.05 * rate}) == before] == []


def test_exchange_by_hand() -> None:
    """4 crossings x 49 layers x 4 micro-batches of 5.9 / 8 of a rank's tokens to each of seven peers."""
    rates = rates_of(device("h100"), "bf16")
    to_peer = ranks_per_token(QWEN3_NEXT_80B, 8) / 8 * 4096 * 4096
    crossings = 4 * 49 * 4
    seconds = crossings * 7 * to_peer / 191e9
    assert 7 * to_peer / 191e9 > to_peer / 126e9, "all peers are the narrower way"
    expected = 0.77 * seconds + 0.23 * crossings * 7 * to_peer / 610e9 + crossings / 4 * 7 * to_peer / 215e9
    expected += 49 * 4 * rates.exact_wait_s
    config = config_80b(global_batch_size=256)
    assert step_80b(64, config=config).exchange_s == pytest.approx(expected, rel=1e-6)


def test_exchange_between_nodes_goes_by_the_network() -> None:
    """Of 32 ranks 24 are elsewhere, each reached through this GPU's link; twice the rate takes half of the time."""
    config = config_80b(expert_parallel_size=32)
    to_peer = ranks_per_token(QWEN3_NEXT_80B, 32) / 32 * 4096 * 4096
    free = {"received_bytes_per_s": 1e30, "beside_bytes_per_s": 1e30, "exact_wait_s": 0.0, "exact_exposed": 1.0}
    step = step_80b(64, config=config, **free)
    assert step.exchange_s == pytest.approx(4 * 49 * 4 * 24 * to_peer / 45e9, rel=1e-6)
    twice = step_80b(64, config=config, network_bytes_per_s=90e9, **free)
    assert twice.exchange_s == pytest.approx(step.exchange_s / 2)


def test_two_in_flight_hide_the_exchange_of_pairs() -> None:
    """Of four micro-batches all, of three two."""
    free = {"received_bytes_per_s": 1e30, "beside_bytes_per_s": 1e30, "exact_wait_s": 0.0}
    for rows, share in ((4, 1.0), (3, 2 / 3)):
        one = config_80b(global_batch_size=64 * rows)
        two = config_80b(global_batch_size=64 * rows, micro_batches_in_flight=2)
        alone, paired = (step_80b(64, config=config, **free).exchange_s for config in (one, two))
        assert paired / alone == pytest.approx((share * 0.6 + (1 - share) * 0.77) / 0.77)


def test_zero_1_reduces_once_and_gathers_once() -> None:
    """Four bytes an element to owners, two back; what all eight GPUs of a node share uses their eight network links."""
    experts = sum(spec.numel for spec in parameter_table(QWEN3_NEXT_80B) if spec.expert) // 8
    dense = sum(spec.numel for spec in parameter_table(QWEN3_NEXT_80B) if not spec.expert)
    sent = experts * 7 / 8, dense * 63 / 64
    once = sent[0] / 45e9 + sent[1] / 205e9
    for rows in (1, 4):
        config = config_80b(global_batch_size=64 * rows)
        seen = step_80b(64, config=config, reduction_hidden=0.0)
        assert seen.reduction_s == pytest.approx(6 * once, rel=1e-6)
    node = step_80b(8, reduction_hidden=0.0)
    assert node.reduction_s == pytest.approx(6 * dense * 7 / 8 / 205e9, rel=1e-6)


def test_what_is_hidden_is_bounded_by_the_passes() -> None:
    """Of one row a GPU what two thirds and one third of its passes do not cover lies open; of eight rows nothing."""
    for rows, covers in ((1, False), (8, True)):
        config = config_80b(global_batch_size=64 * rows, micro_batch_size=rows)
        hidden = step_80b(64, config=config, reduction_hidden=1.0, beside_bytes_per_s=1e30)
        seen = step_80b(64, config=config, reduction_hidden=0.0)
        assert (hidden.model_s > seen.reduction_s) is covers
        assert hidden.reduction_s == pytest.approx(0 if covers else seen.reduction_s - hidden.model_s, abs=1e-9)


def test_what_is_hidden_makes_products_slower() -> None:
    """By the bytes that travel beside them: six of every element."""
    config = config_80b(global_batch_size=64 * 8, micro_batch_size=8)
    sent = 6 * sum(
        spec.numel / 8 * 7 / 8 if spec.expert else spec.numel * 63 / 64 for spec in parameter_table(QWEN3_NEXT_80B)
    )
    hidden = step_80b(64, config=config, reduction_hidden=1.0)
    assert hidden.reduction_s == pytest.approx(sent / 610e9, rel=1e-6)


def test_stages_2_and_3_send_every_micro_batch() -> None:
    """Stage 2 four bytes of a gradient each time and two of a weight once; stage 3 four of weights too."""

    def seen(stage: Literal[1, 2, 3], rows: int, **rates: float) -> StepTime:
        return step_80b(64, config=config_80b(zero_stage=stage, global_batch_size=64 * rows), **rates)

    assert seen(2, 1) == seen(1, 1)
    open_2 = [seen(2, rows, reduction_hidden=0.0).reduction_s for rows in (1, 4)]
    assert open_2[1] / open_2[0] == pytest.approx((4 * 4 + 2) / (4 + 2))
    assert seen(3, 4).reduction_s / seen(3, 1).reduction_s == pytest.approx(4)
    assert seen(3, 4).gradients_s > seen(2, 4).gradients_s == seen(1, 4).gradients_s


def test_an_offloaded_stage_2_goes_deepspeeds_own_way() -> None:
    """Eight bytes of a gradient each time, and two of a weight once."""
    one, four = (
        clock(config).step(replace(Layout.of(config, 64), zero_stage=2, offload_optimizer=True)).reduction_s
        for config in (config_80b(global_batch_size=64 * rows) for rows in (1, 4))
    )
    assert four / one == pytest.approx((8 * 4 + 2) / (8 + 2))


@pytest.mark.parametrize(("rows", "in_flight", "passes"), [(4, 1, 4), (4, 2, 2), (3, 2, 2)])
def test_zero_2_hides_what_earlier_passes_reduce_behind_all_of_a_pass(rows: int, in_flight: int, passes: int) -> None:
    """And of the last pass, as under stage 1, behind its backward half; what is in flight together reduces once."""
    settings = {"reduction_hidden": 1.0, "beside_bytes_per_s": 1e30}

    def seen(stage: Literal[1, 2], **rates: float) -> StepTime:
        config = config_80b(zero_stage=stage, global_batch_size=64 * rows, micro_batches_in_flight=in_flight)
        return step_80b(64, config=config, **rates)

    one, two = (seen(stage, **settings) for stage in (1, 2))
    reduced_s = 4 / 6 * seen(1, reduction_hidden=0.0).reduction_s
    behind = (two.model_s + two.recompute_s) / rows * in_flight
    assert reduced_s > behind, "what does not fit lies open"
    assert two.reduction_s - one.reduction_s == pytest.approx((passes - 1) * (reduced_s - behind), rel=1e-6)


def test_what_nobody_shares_costs_under_stage_3_what_it_does_under_stage_1() -> None:
    """Of one rank all; of two with experts of their own these, and the gradients they share are copied."""
    alone = {stage: clock(slice4(1, 1, 4, "exact", stage)) for stage in (1, 3)}
    times = {stage: timer.step(Layout.of(timer._config, 1)) for stage, timer in alone.items()}
    assert times[3] == times[1]
    config = slice4(2, 2, 4, "dense", 3, num_experts=256)
    dense = sum(spec.numel for spec in parameter_table(config.model) if not spec.expert)
    of_two = clock(config, stage3_bytes=20.0, memory_bytes_per_s=1e12)
    step = of_two.step(Layout.of(config, 2))
    assert step.gradients_s == pytest.approx(4 * dense * 20 / 1e12)
    assert step.update_s == of_two.step(replace(Layout.of(config, 2), zero_stage=1)).update_s


def test_bf16_gradients_travel_in_two_bytes() -> None:
    """And weights in two as before: four in place of six."""
    config = config_80b()
    layout = Layout.of(config, 64)
    timer = clock(config, reduction_hidden=0.0)
    halved = timer.step(replace(layout, gradient_dtype="bf16")).reduction_s
    assert halved == pytest.approx(timer.step(layout).reduction_s * 4 / 6)


def passing_s(tokens: int, value_heads: int) -> float:
    """What the 80B's 36 layers of Gated DeltaNet compute on an H100 to pass the states of a slice."""
    return 36 * tokens * value_heads * 128 * 2 / 56e9


def test_context_by_hand() -> None:
    """The 80B at 128k over 8 ranks: 12 attention layers and an MTP depth, 36 of Gated DeltaNet, twice."""
    config = config_80b(sequence_length=131_072, context_parallel_size=8, global_batch_size=8)
    heads = 2 * (16 + 8) * 256 * 2 * 16_384
    states = 32 * 128 * (128 + 128) * 4
    to_each = 2 * (13 * heads / 8 + 36 * states)
    expected = 7 * to_each / 191e9 + passing_s(16_384, 32)
    assert step_80b(64, config=config).context_s == pytest.approx(expected, rel=1e-6)
    wide = config_80b(sequence_length=131_072, context_parallel_size=16, global_batch_size=4)
    heads = 2 * (16 + 16) * 256 * 2 * 8192
    to_each = 2 * (13 * heads / 16 + 36 * states)
    expected = 8 * to_each / 45e9 + passing_s(8192, 32)
    assert step_80b(64, config=wide).context_s == pytest.approx(expected, rel=1e-6)
    assert step_80b(64).context_s == 0


def test_tokens_of_divided_heads_by_hand() -> None:
    """The 80B over 4 ranks: 48 mixers and an MTP depth's, to each of them tokens and from each outputs, twice."""
    config = config_80b(tensor_parallel_size=4)
    to_each = 2 * 49 * 2 * 1024 * 2048 * 2
    micro_batches = 256 * 4 // 64
    assert step_80b(64, config=config).context_s == pytest.approx(micro_batches * 3 * to_each / 191e9, rel=1e-6)


def test_divided_heads_send_as_much_more_as_a_rank_has_fewer() -> None:
    """Beside 2 slices: a rank sends as many heads of its tokens as before, and the states of half the heads.

    It passes those of half the heads too, of twice the tokens.
    """
    config = config_80b(sequence_length=131_072, context_parallel_size=2, tensor_parallel_size=2, global_batch_size=16)
    tokens = 32_768
    heads = 2 * (16 + 2 * 2) * 256 * 2 * tokens
    states = 16 * 128 * (128 + 128) * 4
    rates = clock(config).rates
    to_slice, to_share = 2 * (13 * heads / 2 + 36 * states), 2 * 49 * 2 * tokens * 2048 * 2
    slowest = min(rates.exact_peer_bytes_per_s, rates.exact_bytes_per_s)
    expected = (to_slice + to_share) / slowest + passing_s(2 * tokens, 16)
    assert step_80b(64, config=config).context_s == pytest.approx(expected, rel=1e-6)
