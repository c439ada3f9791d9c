"""Initial values: distributions, and independence of the parallel layout."""

from __future__ import annotations

import math
import os

import pytest
import torch

from qwen3next_train.model import init
from qwen3next_train.model.init import initial_value, initialize
from qwen3next_train.model.qwen3_next import Qwen3NextForCausalLM
from qwen3next_train.parameters import Init, ParamSpec, parameter_table
from qwen3next_train.topology import Topology
from tests.unit.model.small_models import CPU, cpu_kernels, small_config

ONE = Topology()


def built(
    topology: Topology = ONE, seed: int = 3, dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> dict[str, torch.Tensor]:
    """Initialised parameters of a rank."""
    config = small_config()
    experts = topology.local_experts(config.num_experts)
    with torch.device("meta"):
        model = Qwen3NextForCausalLM(
            config, kernels=cpu_kernels(), local_experts=experts, head_shares=topology.tensor_parallel_size
        )
    initialize(model, parameter_table(config), seed=seed, topology=topology, device=device, dtype=dtype)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_ranks_hold_slices_of_what_one_rank_holds(ranks: int) -> None:
    whole = built()
    share = 6 // ranks
    for rank in range(ranks):
        experts = range(rank * share, (rank + 1) * share)
        for name, value in built(Topology(ranks, rank, ranks)).items():
            expected = whole[name][experts.start : experts.stop] if ".experts." in name else whole[name]
            assert torch.equal(value, expected), name


def test_ranks_that_divide_heads_hold_what_one_rank_computes_with() -> None:
    config, whole = small_config(), built()
    key_dim, group = config.linear_key_head_dim, config.linear_num_value_heads // config.linear_num_key_heads
    value_dim = group * config.linear_value_head_dim
    ranks = [built(Topology(2, rank, tensor_parallel_size=2)) for rank in range(2)]
    for name, value in whole.items():
        shares = [rank[name] for rank in ranks]
        if name.endswith(("out_proj.weight", "o_proj.weight")):
            assert torch.equal(torch.cat(shares, dim=1), value), name
        elif name.endswith("conv1d.weight"):
            # One key head each: channels of its q, of its k and of its values.
            for rank, share in enumerate(shares):
                q, k, v = value.split((2 * key_dim, 2 * key_dim, 2 * value_dim))
                heads = (q.chunk(2)[rank], k.chunk(2)[rank], v.chunk(2)[rank])
                assert torch.equal(share, torch.cat(heads)), name
        elif name.endswith(("dt_bias", "A_log", "in_proj_qkvz.weight", "in_proj_ba.weight")) or any(
            f".{projection}_proj." in name and ".self_attn." in name for projection in "qkv"
        ):
            assert torch.equal(torch.cat(shares), value), name
        else:
            assert all(torch.equal(share, value) for share in shares), name


def test_the_global_random_state_neither_matters_nor_moves() -> None:
    torch.manual_seed(1)
    first, state = built(), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    second = built()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_seed_names_and_experts_give_different_values() -> None:
    first, second = built(seed=3), built(seed=4)
    name = "model.layers.0.mlp.experts.down_proj"
    assert not torch.equal(first[name], second[name])
    assert not torch.equal(first[name][0], first[name][1])
    assert not torch.equal(first[name], first["model.layers.1.mlp.experts.down_proj"])


@pytest.mark.parametrize(
    ("init", "mean", "std", "low", "high"),
    [
        (Init("normal", 0.02), 0, 0.02, -0.12, 0.12),
        (Init("uniform", -0.5, 0.5), 0, 1 / math.sqrt(12), -0.5, 0.5),
        (Init("constant", 1.0), 1, 0, 1, 1),
        (Init("log_uniform", 1.0, 16.0), 1.957, 0.674, 0, math.log(16)),
    ],
)
def test_distributions(init: Init, mean: float, std: float, low: float, high: float) -> None:
    value = initial_value(ParamSpec("x.weight", (200, 300), "head", init), seed=0)
    assert value.dtype == torch.float32
    assert value.mean().item() == pytest.approx(mean, abs=0.01)
    assert value.std().item() == pytest.approx(std, rel=0.02, abs=1e-9)
    assert low <= value.min().item() <= value.max().item() <= high


def test_dtype_is_a_rounding_of_the_same_draw() -> None:
    in_fp32, in_bf16 = built(), built(dtype=torch.bfloat16)
    for spec in parameter_table(small_config()):
        expected = in_fp32[spec.name] if spec.fp32 else in_fp32[spec.name].bfloat16()
        assert in_bf16[spec.name].dtype == expected.dtype
        assert torch.equal(in_bf16[spec.name], expected), spec.name


def test_a_rank_s_bf16_parameters_are_each_the_fp32_draw_rounded_once() -> None:
    topology = Topology(2, 1, 2)
    experts = topology.local_experts(6)
    parameters = built(topology, dtype=torch.bfloat16)
    for spec in parameter_table(small_config()):
        drawn = initial_value(spec, seed=3, experts=experts if spec.expert else None)
        assert torch.equal(parameters[spec.name], drawn if spec.fp32 else drawn.bfloat16()), spec.name


@pytest.mark.parametrize("memory_goes", ["far", "nowhere"])
def test_large_parameters_are_begun_first_as_far_as_memory_goes(
    monkeypatch: pytest.MonkeyPatch, memory_goes: str
) -> None:
    expected, begun = built(), []
    long = expected["lm_head.weight"].numel()

    def generator(seed: int, name: str) -> torch.Generator:
        begun.append(name)
        return seeded(seed, name)

    seeded = init._generator
    monkeypatch.setattr(init, "_generator", generator)
    monkeypatch.setattr(init, "_LONG", long)
    monkeypatch.setattr(init, "_AHEAD", 2**30 if memory_goes == "far" else 1)
    parameters = built()
    table = parameter_table(small_config())
    large = [spec.name for spec in table if not spec.expert and spec.numel >= long]
    assert {"model.embed_tokens.weight", "lm_head.weight"} < set(large)
    first = large if memory_goes == "far" else large[:1]
    rest = [spec.name for spec in table if spec.name not in first]
    # A thread draws one after the other, and the tests' torch has one.
    assert list(dict.fromkeys(name.split("/")[0] for name in begun)) == [*first, *rest]
    assert parameters.keys() == expected.keys()
    assert all(torch.equal(parameters[name], expected[name]) for name in expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_gets_the_bits_of_the_cpu(dtype: torch.dtype) -> None:
    expected = built(dtype=dtype)
    for name, value in built(dtype=dtype, device=torch.device("cuda")).items():
        assert value.is_cuda
        assert value.dtype == expected[name].dtype
        assert torch.equal(value.cpu(), expected[name]), name


def test_marks_on_parameters_survive() -> None:
    config = small_config()
    with torch.device("meta"):
        model = Qwen3NextForCausalLM(config, kernels=cpu_kernels())
    model.lm_head.weight.group_name = "ep_size_2"  # type: ignore[attr-defined]
    initialize(model, parameter_table(config), seed=0, topology=Topology(), device=CPU)
    assert model.lm_head.weight.group_name == "ep_size_2"  # type: ignore[attr-defined]
    assert not model.lm_head.weight.is_meta


@pytest.mark.parametrize(("cores", "ranks", "torch_threads", "expected"), [(128, 8, 1, 16), (2, 4, 1, 1), (4, 1, 8, 8)])
def test_a_rank_draws_on_its_share_of_the_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, ranks: int, torch_threads: int, expected: int
) -> None:
    """Torchrun gives torch one thread; the bits do not depend on how many draw."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: torch_threads)
    assert init._num_threads(Topology(ranks, 0)) == expected
