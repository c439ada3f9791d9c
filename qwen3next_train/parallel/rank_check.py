"""The rank consistency check: before any group is formed, every rank says where it lives and what it runs.

It goes over the store of the rendezvous alone, so ranks that do not fit together are rejected before a GPU is
touched, and even when their devices are such that a process group between them would never form.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from qwen3next_train.errors import ConfigError, PeerLostError
from qwen3next_train.parallel.control import Json

_RESULT = "rank_check/result"
_READ = "rank_check/read"
_READING_TIMEOUT_S = 10.0
_SETTLING_TIME_S = 2.0
_MAX_SHOWN = 3
_MAX_TEXT = 40
_DEAD, _STOPPED = frozenset("ZX"), frozenset("Tt")


@dataclass(frozen=True)
class RunFingerprint:
    """What has to be the same on all ranks, as text.

    Args:
        software: versions by name.
        settings: configuration values by key.
    """

    software: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RankInfo:
    """Where a rank lives.

    Args:
        host: name of its machine.
        pid_namespace: in which its process number is meant; containers of one machine have their own.
        pid: its process number.
    """

    host: str
    pid_namespace: int
    pid: int

    @classmethod
    def this_process(cls) -> RankInfo:
        """The calling process."""
        try:
            namespace = os.stat("/proc/self/ns/pid").st_ino
        except OSError:
            namespace = 0
        return cls(socket.gethostname(), namespace, os.getpid())


def check_ranks(
    store: dist.Store,
    rank: int,
    world_size: int,
    *,
    device_type: str,
    fingerprint: RunFingerprint,
    timeout: timedelta,
    problem: str | None = None,
) -> tuple[RankInfo, ...]:
    """Wait for every rank and learn whether all fit together; rank 0 compares.

    Args:
        store: of the rendezvous, with nothing in it from an earlier start.
        rank: this process.
        world_size: number of processes.
        device_type: of the device this rank has, ``cpu`` or ``cuda``.
        fingerprint: what this rank runs.
        timeout: how long to wait for the others.
        problem: why this rank cannot take part, None if it can.

    Returns:
        All ranks, in their order.

    Raises:
        ConfigError: on every rank, with the same line, when a rank cannot take part or something is not the same
            on all of them.
        PeerLostError: some rank did not arrive.
    """
    own = RankInfo.this_process()
    if world_size == 1:
        if problem is not None:
            raise ConfigError(problem)
        return (own,)
    report = {
        "rank_info": asdict(own),
        "problem": problem,
        "device": {"run.device": device_type},
        **asdict(fingerprint),
    }
    if store.add(f"{_report_key(rank)}/arrived", 1) > 1:
        raise ConfigError(f"RANK: another process is rank {rank} too; give each of the {world_size} its own rank")
    store.set(_report_key(rank), json.dumps(report))
    if rank == 0:
        reports = _collect(store, world_size, timeout)
        rank_infos = tuple(RankInfo(**report["rank_info"]) for report in reports)
        problem = _unfit(reports, rank_infos) or _disagreement(reports, rank_infos)
        result = {"error": problem, "rank_infos": [asdict(info) for info in rank_infos]}
        store.set(_RESULT, json.dumps(result))
    try:
        store.wait([_RESULT], timeout)
    except (RuntimeError, dist.DistError) as error:
        raise PeerLostError(
            f"rank {rank}: no word from rank 0 within {timeout.total_seconds():g} s; "
            "check that every node has started and reaches the first one"
        ) from error
    result = json.loads(store.get(_RESULT))
    num_read = store.add(_READ, 1)
    if result["error"] is None:
        return tuple(RankInfo(**info) for info in result["rank_infos"])
    if rank == 0:
        # The store may live in this process, and the others have to read it.
        _wait_until(lambda: num_read == world_size or store.add(_READ, 0) == world_size, _READING_TIMEOUT_S)
    raise ConfigError(result["error"])


def describe_lost(rank_infos: Sequence[RankInfo], rank: int) -> str | None:
    """Which ranks of this machine are dead or stopped, in words; None when none of them is.

    Waits a moment for it: the kernel closes the connections of a dying process before it counts as dead.

    Args:
        rank_infos: all ranks, in their order.
        rank: this process, one of them.
    """
    own = rank_infos[rank]
    here = {
        other: info.pid
        for other, info in enumerate(rank_infos)
        if other != rank and (info.host, info.pid_namespace) == (own.host, own.pid_namespace)
    }
    found: dict[int, str] = {}

    def look() -> bool:
        found.update({other: state for other, pid in here.items() if (state := _lost_state(pid))})
        return bool(found) or not here

    _wait_until(look, _SETTLING_TIME_S)
    lost = [f"rank {other} (process {here[other]} on {own.host}) {state}" for other, state in sorted(found.items())]
    return ", ".join(lost[:_MAX_SHOWN]) or None


def _lost_state(pid: int) -> str | None:
    try:
        # The name, in parentheses, may hold anything; the state follows it.
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        # Without /proc nothing is known of any process.
        return "has died" if Path("/proc/self/stat").exists() else None
    except OSError:
        return None
    return "has died" if state in _DEAD else "is stopped" if state in _STOPPED else None


def _wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)


def _report_key(rank: int) -> str:
    return f"rank_check/rank_{rank}"


def _collect(store: dist.Store, world_size: int, timeout: timedelta) -> list[Json]:
    keys = [_report_key(rank) for rank in range(world_size)]
    try:
        store.wait(keys, timeout)
    except (RuntimeError, dist.DistError) as error:
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        raise PeerLostError(
            f"rank 0: {_ranks(missing)} of {world_size} did not arrive within {timeout.total_seconds():g} s; "
            "check that every node has started and reaches the first one"
        ) from error
    return [json.loads(store.get(key)) for key in keys]


def _unfit(reports: Sequence[Json], rank_infos: Sequence[RankInfo]) -> str | None:
    """Why some rank cannot take part, and which if not all say the same; None when all can."""
    for report, info, rank in zip(reports, rank_infos, range(len(reports)), strict=True):
        if report["problem"] is not None:
            same = all(other["problem"] == report["problem"] for other in reports)
            return str(report["problem"]) if same else f"{report['problem']} (rank {rank} on {info.host})"
    return None


def _disagreement(reports: Sequence[Json], rank_infos: Sequence[RankInfo]) -> str | None:
    """The line that rejects the run, None when all ranks agree."""
    for section, hint in (
        # Other software may well mean other settings, so its problem is the one to name.
        ("software", "install the same versions on every node"),
        ("settings", "start every rank with the same configuration and options"),
        ("device", "see what qwen3next-train doctor says on those nodes, or choose one with --run.device"),
    ):
        names = list(dict.fromkeys(name for report in reports for name in report[section]))
        differing = [name for name in names if len({report[section].get(name) for report in reports}) > 1]
        if differing:
            values = [report[section].get(differing[0]) for report in reports]
            more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
            return f"{differing[0]}: not the same on all ranks: {_by_value(values, rank_infos)}{more}; {hint}"
    return None


def _by_value(values: Sequence[str | None], rank_infos: Sequence[RankInfo]) -> str:
    by_value: dict[str | None, list[int]] = {}
    for rank, value in enumerate(values):
        by_value.setdefault(value, []).append(rank)
    # Those that are few are probably the wrong ones, and their host is the one to look at.
    several_hosts = len({info.host for info in rank_infos}) > 1
    parts = []
    for value, ranks in list(by_value.items())[:_MAX_SHOWN]:
        hosts = {rank_infos[rank].host for rank in ranks}
        where = f" ({hosts.pop()})" if several_hosts and len(hosts) == 1 else ""
        text = "nothing" if value is None else value if len(value) <= _MAX_TEXT else value[: _MAX_TEXT - 3] + "..."
        parts.append(f"{text} on {_ranks(ranks)}{where}")
    others = len(by_value) - _MAX_SHOWN
    return ", ".join(parts) + (f" and {others} more values" if others > 0 else "")


def _ranks(ranks: Sequence[int]) -> str:
    """Rank numbers, runs of them shortened: ``ranks 0-3, 5``."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and spans[-1][-1] == rank - 1:
            spans[-1] = [spans[-1][0], rank]
        else:
            spans.append([rank])
    texts = [f"{span[0]}-{span[-1]}" if len(span) > 1 else str(span[0]) for span in spans]
    shown = ", ".join(texts[: 2 * _MAX_SHOWN]) + (", ..." if len(texts) > 2 * _MAX_SHOWN else "")
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {shown}"
