"""Start and end of torch.distributed, for one process and for many."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from qwen3next_train.errors import ConfigError, PeerLostError
from qwen3next_train.parallel.control import ControlGroup, GlooControlGroup, SingleProcess

_JOIN_TIMEOUT = datetime.timedelta(minutes=10)


@dataclass(frozen=True)
class ProcessContext:
    """This process among the others.

    Args:
        rank: global rank.
        world_size: number of processes.
        local_rank: rank inside the node.
        device: where the model lives.
        control: host-side agreements between all ranks.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    control: ControlGroup


def select_device(name: str, local_rank: int) -> torch.device:
    """Turn ``run.device`` into this rank's device.

    Raises:
        ConfigError: CUDA asked for but not there, or fewer GPUs than local ranks.
    """
    available = torch.cuda.is_available()
    if name == "cpu" or (name == "auto" and not available):
        return torch.device("cpu")
    if not available:
        raise ConfigError("run.device: cuda is not available on this machine; use --run.device cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"run.device: local rank {local_rank} has no GPU, this machine has {torch.cuda.device_count()}; "
            "start fewer processes per node"
        )
    return torch.device("cuda", local_rank)


@contextmanager
def process_context(device_name: str) -> Iterator[ProcessContext]:
    """Join the process group torchrun describes in the environment, or make one of a single process.

    Args:
        device_name: ``run.device``.

    Raises:
        ConfigError: unusable device.
        PeerLostError: the other ranks did not join in time.
    """
    launched = "RANK" in os.environ
    # DeepSpeed reads these even when torch.distributed is already initialised.
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    for variable, value in defaults.items():
        os.environ.setdefault(variable, value)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ["LOCAL_RANK"])
    device = select_device(device_name, local_rank)
    # DeepSpeed chooses its accelerator when it is first imported and would take a GPU the user said no to.
    os.environ["DS_ACCELERATOR"] = device.type
    store = None if launched else dist.HashStore()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend, device_id = "cpu:gloo,cuda:nccl", device
    else:
        backend, device_id = "gloo", None
    try:
        dist.init_process_group(
            backend,
            store=store,
            rank=-1 if launched else rank,
            world_size=-1 if launched else world_size,
            timeout=_JOIN_TIMEOUT,
            device_id=device_id,
        )
    except (RuntimeError, dist.DistError) as error:
        raise PeerLostError(
            f"rank {rank}: the {world_size} processes did not find each other: {_first_line(error)}; "
            "check the master address and port and that every node started"
        ) from error
    try:
        yield ProcessContext(rank, world_size, local_rank, device, _control_group(world_size))
    finally:
        dist.destroy_process_group()


def _control_group(world_size: int) -> ControlGroup:
    if world_size == 1:
        return SingleProcess()
    return GlooControlGroup(dist.new_group(backend="gloo"))


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
