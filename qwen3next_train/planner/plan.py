"""What a run needs before it is started: parameters, FLOPs, memory, time, and what to change if it does not fit.

Pure arithmetic over the configuration; no torch, no GPU.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

from qwen3next_train.accounting.flops import TRAINING_PASSES, forward_flops
from qwen3next_train.accounting.hardware import Device, find_device
from qwen3next_train.accounting.megatron_flops import megatron_training_flops
from qwen3next_train.accounting.memory import ADAM_STATE_BYTES, Layout, memory_per_gpu, parameter_kinds
from qwen3next_train.accounting.params import parameter_table
from qwen3next_train.config.schema import Config, ModelConfig
from qwen3next_train.config.validate import validate_for_world
from qwen3next_train.errors import ConfigError
from qwen3next_train.planner.layouts import Traffic, layouts_that_fit, traffic_per_step, usable_bytes

ASSUMED_MFU = 0.25
"""MFU when none is stated; the best published figures for this model family on Hopper are 0.1 to 0.3."""
_SECONDS_PER_DAY = 86_400


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters.

    Args:
        total: all, MTP included.
        active: used by a token in the decoder: everything but MTP and the experts it is not sent to; both
            embeddings included.
        by_part: all, by part; MTP depths are one part.
    """

    total: int
    active: int
    by_part: dict[str, int]


@dataclass(frozen=True)
class Plan:
    """Everything ``plan`` reports.

    Args:
        config: the planned configuration.
        layout: its layout over the GPUs.
        gpu: GPU as the user named it.
        device: its row of the device table; None when unknown, and then ``fits``, times and traffic are None.
        mfu: model FLOPs utilisation that the times assume.
        mfu_is_assumed: nobody stated it.
        parameters: numbers of parameters.
        num_tokens_per_step: tokens of the global batch.
        num_steps: steps of the run.
        flops_by_part: training FLOPs per step, exact, every row taken as one document.
        flops_megatron: the same step in Megatron-LM's convention.
        memory_by_part: bytes on one GPU.
        checkpoint_bytes: fp32 master weights and both moments of all ranks.
        fits: whether the memory fits the device.
        changes: layouts near this one that fit, best first; empty when this one fits or none does.
        traffic: communication per step.
    """

    config: Config
    layout: Layout
    gpu: str
    device: Device | None
    mfu: float
    mfu_is_assumed: bool
    parameters: Parameters
    num_tokens_per_step: int
    num_steps: int
    flops_by_part: dict[str, int]
    flops_megatron: float
    memory_by_part: dict[str, int]
    checkpoint_bytes: int
    fits: bool | None
    changes: tuple[Layout, ...]
    traffic: Traffic | None

    @property
    def flops_per_step(self) -> int:
        """Training FLOPs of the global batch."""
        return sum(self.flops_by_part.values())

    @property
    def flops_per_token(self) -> int:
        """Training FLOPs per token, a whole number because every row counts as one document."""
        return self.flops_per_step // self.num_tokens_per_step

    @property
    def memory_bytes(self) -> int:
        """Bytes on one GPU."""
        return sum(self.memory_by_part.values())

    @property
    def step_time_s(self) -> float | None:
        """Seconds per optimizer step at :attr:`mfu`; None when the device's peak is unknown."""
        if self.device is None:
            return None
        peak = self.device.peak_flops(self.layout.precision)
        return self.flops_per_step / (self.layout.world_size * peak * self.mfu)

    @property
    def days(self) -> float | None:
        """Days for all steps; None when the device's peak is unknown."""
        return None if self.step_time_s is None else self.num_steps * self.step_time_s / _SECONDS_PER_DAY


def make_plan(config: Config, *, gpus: int, gpu: str, mfu: float | None, tokens: float | None) -> Plan:
    """Plan a run.

    Args:
        config: resolved configuration.
        gpus: number of GPUs, one process each.
        gpu: a name of :mod:`qwen3next_train.accounting.hardware` or a ``torch.cuda`` device name.
        mfu: model FLOPs utilisation in (0, 1] for the times; None assumes :data:`ASSUMED_MFU`.
        tokens: tokens to train on; None takes ``run.steps``.

    Raises:
        ConfigError: a number out of range, or a layout that training would refuse.
    """
    _check_inputs(config, gpus=gpus, mfu=mfu, tokens=tokens)
    layout = Layout(
        world_size=gpus,
        expert_parallel_size=config.parallel.expert_parallel_size,
        zero_stage=config.parallel.zero_stage,
        precision=config.run.precision,
        micro_batch_size=config.run.micro_batch_size,
        sequence_length=config.data.sequence_length,
    )
    device = find_device(gpu)
    kinds = parameter_kinds(config.model)
    memory = memory_per_gpu(config.model, layout, kinds=kinds)
    num_tokens = config.run.global_batch_size * layout.sequence_length
    squared = num_tokens * layout.sequence_length
    forward = forward_flops(config.model, num_tokens=num_tokens, sum_squared_lengths=squared)
    parameters = count_parameters(config.model)
    fits = None if device is None else sum(memory.values()) <= usable_bytes(device)
    return Plan(
        config=config,
        layout=layout,
        gpu=gpu,
        device=device,
        mfu=ASSUMED_MFU if mfu is None else mfu,
        mfu_is_assumed=mfu is None,
        parameters=parameters,
        num_tokens_per_step=num_tokens,
        num_steps=config.run.steps if tokens is None else math.ceil(tokens / num_tokens),
        flops_by_part={part: TRAINING_PASSES * count for part, count in forward.items()},
        flops_megatron=megatron_training_flops(config.model, num_tokens=num_tokens, sum_squared_lengths=squared),
        memory_by_part=memory,
        checkpoint_bytes=ADAM_STATE_BYTES * parameters.total,
        fits=fits,
        changes=layouts_that_fit(config, layout, device, kinds) if device is not None and not fits else (),
        traffic=None if device is None else traffic_per_step(config, layout, device, kinds),
    )


def count_parameters(model: ModelConfig) -> Parameters:
    """Numbers of parameters from the parameter table."""
    by_part: defaultdict[str, int] = defaultdict(int)
    for spec in parameter_table(model):
        by_part["mtp" if spec.name.startswith("mtp.") else spec.part] += spec.numel
    total = sum(by_part.values())
    idle_experts = by_part["experts"] // model.num_experts * (model.num_experts - model.num_experts_per_tok)
    return Parameters(total, total - by_part["mtp"] - idle_experts, dict(by_part))


def _check_inputs(config: Config, *, gpus: int, mfu: float | None, tokens: float | None) -> None:
    if gpus < 1:
        raise ConfigError(f"plan: --gpus: {gpus} is not a number of GPUs; give 1 or more")
    if mfu is not None and not 0 < mfu <= 1:
        raise ConfigError(f"plan: --mfu: {mfu} is not a utilisation; give a fraction such as 0.3")
    if tokens is not None and not (tokens > 0 and math.isfinite(tokens)):
        raise ConfigError(f"plan: --tokens: {tokens} is not a number of tokens; give one such as 1e12")
    validate_for_world(config, gpus)
