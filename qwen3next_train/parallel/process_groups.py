"""Start and end of torch.distributed, for one process and for many."""

from __future__ import annotations

import datetime
import math
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from qwen3next_train.config.schema import ParallelConfig, RunConfig
from qwen3next_train.errors import ConfigError, PeerLostError, TrainError
from qwen3next_train.exhaustion import is_out_of_files, is_out_of_memory
from qwen3next_train.launcher import LaunchedProcess
from qwen3next_train.log import get_logger
from qwen3next_train.parallel.control import ControlGroup, GlooControlGroup, SingleProcess
from qwen3next_train.parallel.rank_check import RankInfo, RunFingerprint, check_ranks, describe_lost
from qwen3next_train.topology import Topology

_JOIN_TIMEOUT = datetime.timedelta(minutes=10)
_PREPARATION_TIMEOUT = datetime.timedelta(days=7)
_FORMING_TIMEOUT = datetime.timedelta(minutes=2)
"""To form a group takes a moment once all ranks have met; for one that has died meanwhile the others wait so long."""
_FORMING_TIMEOUT_PER_RANK = datetime.timedelta(seconds=1)
"""More than that: gloo connects every rank with every other, which of a thousand takes minutes."""
_SAID_AFTER_S = 10.0
_NO_INTERFACE = re.compile(r"Unable to find address for: (\S+)")
_CANNOT_LISTEN = re.compile(r"failed to listen.*name: (E[A-Z]+)", re.DOTALL)

T = TypeVar("T")


@dataclass(frozen=True)
class ProcessContext:
    """This process among the others.

    Args:
        rank: global rank.
        world_size: number of processes.
        local_rank: rank inside the node.
        local_world_size: processes on this node.
        device: where the model lives.
        control: host-side agreements between all ranks.
        saving: the same for the thread that writes checkpoints: two threads must not share a group.
        preparation: the same, patient enough for one rank to tokenise a corpus.
        rank_infos: where every rank lives.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    control: ControlGroup
    saving: ControlGroup
    preparation: ControlGroup
    rank_infos: tuple[RankInfo, ...]

    @property
    def ranks_per_node(self) -> int:
        """Consecutive ranks that share a machine; where some have more, a number that divides them all."""
        return math.gcd(*(len(list(run)) for _, run in groupby(info.host for info in self.rank_infos)))

    def topology(self, parallel: ParallelConfig) -> Topology:
        """This process's place in a layout.

        Raises:
            ConfigError: a size does not divide the number of processes.
        """
        return Topology(
            self.world_size,
            self.rank,
            parallel.expert_parallel_size,
            self.ranks_per_node,
            parallel.context_parallel_size,
            parallel.tensor_parallel_size,
        )


def select_device(name: str, local_rank: int, *, setting: str = "run.device") -> torch.device:
    """Turn ``run.device`` into this rank's device.

    Args:
        name: auto, cpu or cuda.
        local_rank: of this process, on its machine.
        setting: what gave the name, for messages.

    Raises:
        ConfigError: CUDA asked for but not there, or fewer GPUs than local ranks.
    """
    available = torch.cuda.is_available()
    if name == "cpu" or (name == "auto" and not available):
        return torch.device("cpu")
    if not available:
        option = f"--{setting.removeprefix('--')}"
        raise ConfigError(f"{setting}: cuda is not available on this machine; use {option} cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"{setting}: local rank {local_rank} has no GPU, this machine has {torch.cuda.device_count()}; "
            "start fewer processes per node"
        )
    return torch.device("cuda", local_rank)


@contextmanager
def process_context(
    device_name: str,
    *,
    fingerprint: RunFingerprint | None = None,
    peer_timeout_s: float = RunConfig().peer_timeout_s,
) -> Iterator[ProcessContext]:
    """Join the process group torchrun describes in the environment, or make one of a single process.

    Args:
        device_name: ``run.device``.
        fingerprint: what has to be the same on all ranks; None for nothing but the kind of device.
        peer_timeout_s: ``run.peer_timeout_s``.

    Raises:
        ConfigError: unusable device or network interface, an environment that describes no process, or the ranks do not
            fit together.
        PeerLostError: the other ranks did not join in time.
    """
    process = LaunchedProcess.from_environment(os.environ)
    rank, world_size, local_rank = process.rank, process.world_size, process.local_rank
    # DeepSpeed reads these even when torch.distributed is already initialised. Without LOCAL_SIZE its ZeRO-3 on CPUs
    # starts numactl at every reduction, to count what it takes for devices.
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    defaults["LOCAL_SIZE"] = str(process.local_world_size)
    added = [variable for variable in defaults if variable not in os.environ]
    os.environ.update({variable: defaults[variable] for variable in added})
    problem = None
    try:
        device = select_device(device_name, local_rank)
    except ConfigError as error:
        # Raised when all ranks know: the others would wait for this one.
        device, problem = torch.device("cpu"), str(error)
    # DeepSpeed chooses its accelerator when it is first imported and would take a GPU the user said no to.
    os.environ["DS_ACCELERATOR"] = device.type
    timeout = datetime.timedelta(seconds=peer_timeout_s)
    try:
        with _said_when_slow(process):
            store = _meet(process)
            rank_infos = check_ranks(
                store,
                rank,
                world_size,
                device_type=device.type,
                fingerprint=fingerprint or RunFingerprint(),
                timeout=_JOIN_TIMEOUT,
                problem=problem,
            )
    except (RuntimeError, dist.DistError) as error:
        if is_out_of_memory(error) or is_out_of_files(error):
            raise
        raise PeerLostError(
            f"rank {rank}: the {world_size} processes did not find each other: {_first_line(error)}; "
            "check the master address and port and that every node started"
        ) from error
    with _named_when_lost(rank_infos, rank):
        _form_first_group(store, process, device, timeout)
    try:
        with _named_when_lost(rank_infos, rank):
            control, saving = _control_group(world_size, timeout), _control_group(world_size, timeout)
            preparation = _control_group(world_size, _PREPARATION_TIMEOUT)
        yield ProcessContext(
            rank,
            world_size,
            local_rank,
            process.local_world_size,
            device,
            control=control,
            saving=saving,
            preparation=preparation,
            rank_infos=rank_infos,
        )
        # All leave together: torchrun kills the others 30 s after the first that leaves with a code other than 0.
        control.all_true(True)
    finally:
        _destroy_process_groups()
        # A later context of this process must not take our defaults for a launcher's.
        for variable in added:
            del os.environ[variable]


def _form_first_group(
    store: dist.Store, process: LaunchedProcess, device: torch.device, timeout: datetime.timedelta
) -> None:
    """Start torch.distributed with a group of all ranks, which have met, so that forming it is not waited for long."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("process_group", store),
        rank=process.rank,
        world_size=process.world_size,
        timeout=_forming_timeout(process.world_size, timeout),
        device_id=device if device.type == "cuda" else None,
    )
    _set_pg_timeout(timeout)


def _destroy_process_groups() -> None:
    """End torch.distributed, and let DeepSpeed, where it is in use, forget its groups: a next context has others."""
    deepspeed_comm = sys.modules.get("deepspeed.comm")
    if deepspeed_comm is not None and deepspeed_comm.is_initialized():
        deepspeed_comm.destroy_process_group()
    else:
        dist.destroy_process_group()


def first_on_each_node(context: ProcessContext, prepare: Callable[[], T]) -> T:
    """Run ``prepare`` on the first rank of every node, then on the others, which find its work done.

    Raises:
        TrainError: what the first failing rank raised, on every rank.
    """
    result, failure = None, None
    if context.local_rank == 0:
        try:
            result = prepare()
        except TrainError as error:
            failure = error
    outcomes = context.preparation.gather_json(None if failure is None else [type(failure).__name__, str(failure)])
    if failure is not None:
        raise failure
    reported = next((outcome for outcome in outcomes if outcome), None)
    if reported is not None:
        raise _error_of_name(reported[0])(reported[1])
    return prepare() if result is None else result


def _error_of_name(name: str) -> type[TrainError]:
    return next((kind for kind in TrainError.__subclasses__() if kind.__name__ == name), TrainError)


def _meet(process: LaunchedProcess) -> dist.Store:
    """The store over which the ranks find each other.

    Raises:
        ConfigError: rank 0 cannot listen where the others expect it.
    """
    if not process.is_launched:
        return dist.HashStore()
    try:
        store = next(dist.rendezvous("env://", timeout=_JOIN_TIMEOUT))[0]
    except dist.DistNetworkError as error:
        cannot_listen = _CANNOT_LISTEN.search(str(error))
        if cannot_listen is None:
            raise
        raise ConfigError(
            f"MASTER_PORT: rank 0 cannot listen on {process.port} ({cannot_listen[1]}); choose a port that is free, "
            "and check that no other process has RANK 0"
        ) from error
    # Workers that torchrun starts again meet in the store of those before, whose addresses are still in it.
    return dist.PrefixStore(f"start_{process.num_restarts}", store)


@contextmanager
def _said_when_slow(process: LaunchedProcess) -> Iterator[None]:
    """Say what is waited for when the others do not come at once."""

    def say() -> None:
        # An error for the logger: other ranks say nothing less, and theirs may be the host that is wrong.
        get_logger().error(
            "waiting up to %.0f min for the %d processes to meet at %s port %d (MASTER_ADDR, MASTER_PORT)",
            _JOIN_TIMEOUT.total_seconds() / 60,
            process.world_size,
            process.host,
            process.port,
        )

    timer = threading.Timer(_SAID_AFTER_S, say)
    timer.daemon = True
    if process.local_rank == 0 and process.is_launched:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def _named_when_lost(rank_infos: Sequence[RankInfo], rank: int) -> Iterator[None]:
    """While the groups are formed, for which a rank waits until every other one has come or the connection ends."""
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        if is_out_of_memory(error) or is_out_of_files(error):
            # It is this machine that lacks something, not another rank.
            raise
        if (missing := _NO_INTERFACE.search(str(error))) is not None:
            raise ConfigError(
                f"GLOO_SOCKET_IFNAME: no network interface {missing[1]} here; name one that ip addr lists, or unset it"
            ) from error
        lost = describe_lost(rank_infos, rank) or "another rank was lost or cannot be reached"
        raise PeerLostError(
            f"rank {rank}: {lost}, while the process groups were formed: {_first_line(error)}; run the same line again"
        ) from error


def _control_group(world_size: int, timeout: datetime.timedelta) -> ControlGroup:
    if world_size == 1:
        return SingleProcess()
    group = dist.new_group(backend="gloo", timeout=_forming_timeout(world_size, timeout))
    _set_pg_timeout(timeout, group)
    return GlooControlGroup(group)


def _forming_timeout(world_size: int, timeout: datetime.timedelta) -> datetime.timedelta:
    """How long to wait for a group to form that gives up after ``timeout`` once it is there."""
    return min(timeout, _FORMING_TIMEOUT + world_size * _FORMING_TIMEOUT_PER_RANK)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
