"""Initial weights: a pure function of (seed, parameter name, expert), the same at every parallel layout.

Of what tensor parallelism divides, the whole is drawn and a rank takes its heads.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import nn

from qwen3next_train.held_elements import held_runs, held_shape
from qwen3next_train.model.qwen3_next import Qwen3NextForCausalLM
from qwen3next_train.parameters import Init, ParamSpec
from qwen3next_train.topology import Topology

_AHEAD = 2**30
"""Elements that may be drawn before the parameter in front of them is in place: 4 GiB of host memory, in bf16 2 GiB.

On the way to bf16, what each thread is drawing (a whole parameter, of stacked ones one expert's) takes 4 bytes an
element more.
"""

_LONG = 2**26
"""Elements of a parameter that keeps its one thread busy for so long that it is begun first: embedding and head."""


class _Begun(NamedTuple):
    spec: ParamSpec
    numel: int
    value: Callable[[], torch.Tensor]


def initialize(
    model: Qwen3NextForCausalLM,
    table: Sequence[ParamSpec],
    *,
    seed: int,
    topology: Topology,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Give every parameter memory on ``device`` and its initial value.

    Values are drawn in fp32 on the CPU, each tensor (each expert of a stacked one) from its own generator, and rounded
    to the parameter's dtype there. A generator uses one thread, so this process' share of the cores draws, however few
    threads torch has: torchrun gives it one, on which twelve billion elements take nearly two minutes.

    Args:
        model: usually on the meta device.
        table: ``parameter_table`` of the model's configuration.
        seed: run seed.
        topology: whose experts and heads the model has.
        device: where the parameters will live.
        dtype: of the parameters, except those the table keeps in fp32.
    """
    with ThreadPoolExecutor(_num_threads(topology)) as pool:
        for spec, value in _drawn_ahead(pool, table, seed=seed, topology=topology, dtype=dtype):
            module_name, _, attribute = spec.name.rpartition(".")
            module = model.get_submodule(module_name)
            old = module.get_parameter(attribute)
            assert value.shape == old.shape, f"{spec.name}: table {tuple(value.shape)}, model {tuple(old.shape)}"
            new = nn.Parameter(value.to(device), old.requires_grad)
            new.__dict__.update(old.__dict__)
            setattr(module, attribute, new)
    model.tie_weights()


def _num_threads(topology: Topology) -> int:
    """Draws at a time: as many as torch has threads, or this process' share of the cores that it may use."""
    num_local = min(topology.world_size, topology.ranks_per_node)
    return max(torch.get_num_threads(), len(os.sched_getaffinity(0)) // num_local)


def initial_value(spec: ParamSpec, *, seed: int, experts: range | None = None) -> torch.Tensor:
    """Initial value of one parameter, fp32 on the CPU.

    Args:
        spec: row of the parameter table.
        seed: run seed.
        experts: for stacked expert tensors, the global ids of the slices wanted; None for the whole tensor.
    """
    with ThreadPoolExecutor(1) as pool:
        return _start(pool, spec, seed, experts, torch.float32)()


def _drawn_ahead(
    pool: ThreadPoolExecutor, table: Sequence[ParamSpec], *, seed: int, topology: Topology, dtype: torch.dtype
) -> Iterator[tuple[ParamSpec, torch.Tensor]]:
    """Every parameter's value, later ones under way while one is used: in the table's order, but long draws last."""

    def begin(spec: ParamSpec) -> _Begun:
        experts = topology.local_experts(spec.shape[0]) if spec.expert else None
        numel = spec.numel // spec.shape[0] * len(experts) if experts is not None else spec.numel
        value = _start(pool, spec, seed, experts, torch.float32 if spec.fp32 else dtype)
        if spec.heads is None or topology.tensor_parallel_size == 1:
            return _Begun(spec, numel, value)
        return _Begun(spec, numel, lambda: _own_heads(value(), spec, topology))

    long = deque(spec for spec in table if not spec.expert and spec.numel >= _LONG)
    last: deque[_Begun] = deque()
    ahead = 0
    while long and ahead < _AHEAD:
        last.append(begin(long.popleft()))
        ahead += last[-1].numel
    begun_first = {begun.spec.name for begun in last}
    waiting = deque(spec for spec in table if spec.name not in begun_first)
    started: deque[_Begun] = deque()
    while waiting or started or last:
        while waiting and (not started or ahead < _AHEAD):
            started.append(begin(waiting.popleft()))
            ahead += started[-1].numel
        spec, numel, value = (started or last).popleft()
        yield spec, value()
        ahead -= numel


def _own_heads(value: torch.Tensor, spec: ParamSpec, topology: Topology) -> torch.Tensor:
    parts = [runs.of(value.flatten()).flatten() for runs in held_runs(spec, topology)]
    return torch.cat(parts).view(held_shape(spec, topology))


def _start(
    pool: ThreadPoolExecutor, spec: ParamSpec, seed: int, experts: range | None, dtype: torch.dtype
) -> Callable[[], torch.Tensor]:
    """Begin to draw one parameter and to round it, each expert by itself; what comes back waits for it."""
    if not spec.expert:

        def draw_whole() -> torch.Tensor:
            return _draw(spec.init, spec.shape, _generator(seed, spec.name)).to(dtype)

        return pool.submit(draw_whole).result
    wanted = range(spec.shape[0]) if experts is None else experts
    value = torch.empty(len(wanted), *spec.shape[1:], dtype=dtype, device="cpu")

    def draw(index: int) -> None:
        generator = _generator(seed, f"{spec.name}/{wanted[index]}")
        value[index] = _draw(spec.init, spec.shape[1:], generator)

    drawn = [pool.submit(draw, index) for index in range(len(wanted))]

    def result() -> torch.Tensor:
        for one in drawn:
            one.result()
        return value

    return result


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator(device="cpu")
    generator.manual_seed(int.from_bytes(digest, "little") >> 1)
    return generator


def _draw(init: Init, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    value = torch.empty(shape, dtype=torch.float32, device="cpu")
    match init.kind:
        case "normal":
            return value.normal_(0.0, init.a, generator=generator)
        case "uniform":
            return value.uniform_(init.a, init.b, generator=generator)
        case "log_uniform":
            return value.uniform_(init.a, init.b, generator=generator).log_()
        case "inverse_softplus_log_uniform":
            dt = value.uniform_(math.log(init.a), math.log(init.b), generator=generator).exp_()
            return dt + torch.log(-torch.expm1(-dt))
        case "constant":
            return value.fill_(init.a)
