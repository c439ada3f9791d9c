"""What a run needs against what is free, on the host and on the GPU, before anything is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qwen3next_train.accounting.layout import Layout
from qwen3next_train.accounting.memory import certain_bytes, host_bytes, memory_per_gpu
from qwen3next_train.config.schema import Config, Section
from qwen3next_train.config.validate import validate
from qwen3next_train.errors import OutOfMemory
from qwen3next_train.exhaustion import memory_limit_hint
from qwen3next_train.log import get_logger

# The first error of a run may come before torch is there, and is explained from here.
if TYPE_CHECKING:
    import torch

    from qwen3next_train.parallel.process_groups import ProcessContext

_GIB = 2**30
# Version 2 of control groups, then version 1: what may be used, what is.
_CGROUP_FILES = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)


def check_memory(config: Config, layout: Layout, context: ProcessContext) -> None:
    """Compare the plan with the free memory of this rank's GPU and host; to be called on all ranks.

    What cannot fit is rejected; a plan that is larger than a GPU's free memory only by activations is said.

    Args:
        config: the resolved configuration, which fits the world size.
        layout: how it is spread.
        context: this process among the others.

    Raises:
        OutOfMemory: on every rank, with the line of the first that lacks memory.
    """
    device_free = _free_device_bytes(context.device)
    parts = memory_per_gpu(config.model, layout)
    problem = memory_problem(
        config,
        layout,
        parts,
        num_local=context.local_world_size,
        host_available=available_host_bytes(),
        device_free=device_free,
    )
    first = next((each for each in context.control.gather_json(problem) if each is not None), None)
    if first is not None:
        raise OutOfMemory(first)
    planned = sum(parts.values())
    if context.rank == 0 and device_free is not None and planned > device_free:
        get_logger().warning(
            "memory: the plan takes up to %s of a GPU that has %s free; should it run out of memory, %s",
            _gib(planned),
            _gib(device_free),
            settings_that_help(config, on_device=True),
        )


def memory_problem(
    config: Config,
    layout: Layout,
    parts: Mapping[str, int],
    *,
    num_local: int,
    host_available: int | None,
    device_free: int | None,
) -> str | None:
    """The line that rejects a run that cannot fit, None when it may.

    Args:
        config: the resolved configuration.
        layout: how it is spread.
        parts: what that takes of a GPU, by :func:`~qwen3next_train.accounting.memory.memory_per_gpu`.
        num_local: processes on this host.
        host_available: bytes that new processes can have on this host, None when unknown.
        device_free: free bytes of this process' GPU, None when it trains on the CPU.
    """
    if device_free is not None:
        needed = certain_bytes(parts)
        if needed > device_free:
            return (
                f"out of memory: weights, gradients and optimizer take {_gib(needed)} of a GPU "
                f"that has {_gib(device_free)} free; "
                f"{settings_that_help(config, on_device=True)}"
            )
    needed = num_local * host_bytes(config, layout, trains_on_host=device_free is None)
    if host_available is not None and needed > host_available:
        each = f" for {num_local} processes" if num_local > 1 else ""
        return (
            f"out of memory: the plan takes {_gib(needed)} of host memory{each}, {_gib(host_available)} are free; "
            f"{settings_that_help(config, on_device=False)}"
        )
    return None


def has_host_room(num_bytes: int, *, num_local: int) -> bool:
    """Whether each process of this host can take so many bytes more, an eighth of what is free being left to others.

    Args:
        num_bytes: of one process.
        num_local: processes on this host, all of which ask before one of them takes any.
    """
    available = available_host_bytes()
    return available is None or num_local * num_bytes <= available - available // 8


def settings_that_help(config: Config | None, *, on_device: bool) -> str:
    """What to change when memory is short: settings that are not at their most sparing, the mildest first.

    None that the others would have refused.

    Args:
        config: what was to be trained; None where nothing was.
        on_device: the memory of a GPU is short, not the host's.
    """
    limit = "" if on_device else memory_limit_hint()
    if config is None:
        return f"{limit}close other programs, or use a machine with more memory"
    run, parallel, data = config.run, config.parallel, config.data
    ways = []
    if run.micro_batch_size > 1:
        ways.append(f"lower run.micro_batch_size ({run.micro_batch_size})")
    if "layer" not in parallel.recompute:
        ways.append("add layer to parallel.recompute")
    if on_device:
        if parallel.offload_optimizer == "none" and _is_allowed(config, "parallel", offload_optimizer="cpu"):
            ways.append("set parallel.offload_optimizer to cpu")
        if parallel.zero_stage < 3 and _is_allowed(config, "parallel", zero_stage=parallel.zero_stage + 1):
            ways.append(f"raise parallel.zero_stage ({parallel.zero_stage}) on several GPUs")
        ways.append(f"raise parallel.expert_parallel_size ({parallel.expert_parallel_size})")
        if run.micro_batch_size == 1:
            ways.append(f"raise parallel.context_parallel_size ({parallel.context_parallel_size}) on several GPUs")
    else:
        if parallel.offload_optimizer == "cpu":
            ways.append("set parallel.offload_optimizer to none")
        ways.append("start fewer processes per node")
        if data.num_prefetch_steps:
            ways.append(f"lower data.num_prefetch_steps ({data.num_prefetch_steps})")
    if config.optimizer.moments_dtype == "fp32" and _is_allowed(config, "optimizer", moments_dtype="bf16"):
        ways.append("set optimizer.moments_dtype to bf16")
    ways.append(f"shorten data.sequence_length ({data.sequence_length}) or make the model smaller")
    return f"{limit}{', '.join(ways)}; see qwen3next-train plan"


def _is_allowed(config: Config, section: str, **values: object) -> bool:
    """Whether a configuration without broken rules has none with these values of a section."""
    changed: Section = getattr(config, section).model_copy(update=values)
    return not validate(config.model_copy(update={section: changed}))


def available_host_bytes(root: Path = Path("/")) -> int | None:
    """Bytes that new processes can have: of the machine and of this process' control group; None when unknown.

    Args:
        root: of the file system with ``proc`` and ``sys``.
    """
    found = [_available_in_machine(root / "proc/meminfo"), *_available_in_cgroup(root)]
    known = [value for value in found if value is not None]
    return min(known, default=None)


def num_oom_kills(root: Path = Path("/")) -> int | None:
    """How often the kernel has killed a process here for want of memory; None when unknown."""
    for path in (*_cgroup_folders(root), root / "proc/vmstat"):
        path = path / "memory.events" if path.is_dir() else path
        counts = _numbers(path)
        if "oom_kill" in counts:
            return counts["oom_kill"]
    return None


def _free_device_bytes(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    import torch

    return torch.cuda.mem_get_info(device)[0]


def _available_in_machine(meminfo: Path) -> int | None:
    kib = _numbers(meminfo).get("MemAvailable:")
    return None if kib is None else kib * 1024


def _available_in_cgroup(root: Path) -> list[int | None]:
    found = []
    for folder in _cgroup_folders(root):
        for limit_name, usage_name in _CGROUP_FILES:
            limit, usage = _number(folder / limit_name), _number(folder / usage_name)
            if limit is None or usage is None:
                continue
            # Files in the page cache count as used and are given up when memory is asked for.
            stat = _numbers((folder / limit_name).parent / "memory.stat")
            cached = stat.get("total_inactive_file", stat.get("inactive_file", 0))
            found.append(max(limit - usage + cached, 0))
    return [*found, None]


def _cgroup_folders(root: Path) -> list[Path]:
    """The control group of this process and those it is in, as far as they are visible."""
    base = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return [base]
    own = next((line.removeprefix("0::").strip("/") for line in lines if line.startswith("0::")), "")
    folder = base / own
    return [folder, *(each for each in folder.parents if each == base or base in each.parents)] if own else [base]


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        # "max" where nothing is limited.
        return None


def _numbers(path: Path) -> dict[str, int]:
    """A file of lines "name number"."""
    try:
        words = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {each[0]: int(each[1]) for each in words if len(each) > 1 and each[1].isdecimal()}


def _gib(count: int) -> str:
    return f"{count / _GIB:,.1f} GiB"
