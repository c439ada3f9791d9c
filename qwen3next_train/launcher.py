"""What a launcher says in the environment: which process this is, of how many, and where they meet."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from qwen3next_train.errors import ConfigError

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
"""A launcher has started this process where any of these is set."""
MAX_PROCESSES = 1_000_000
LARGEST_PORT = 65_535

_MEETING_VARIABLES = ("MASTER_ADDR", "MASTER_PORT")
# torch reads it as a number too.
_RESTARTS = "TORCHELASTIC_RESTART_COUNT"
_WHOLE_NUMBER = re.compile("[0-9]{1,12}")
_MAX_SHOWN = 60
_HINT = f"start with torchrun or --nproc-per-node, or unset {', '.join(RANK_VARIABLES)} for a single process"


@dataclass(frozen=True)
class LaunchedProcess:
    """This process among the others.

    Args:
        rank: global rank.
        world_size: number of processes.
        local_rank: rank inside the node.
        local_world_size: processes on this node.
        host: where rank 0 or the launcher listens; empty when no launcher has started this process.
        port: on ``host``; 0 when no launcher has started this process.
        num_restarts: how often torchrun has started all processes again (``--max-restarts``).
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    host: str = ""
    port: int = 0
    num_restarts: int = 0

    @property
    def is_launched(self) -> bool:
        """Whether a launcher has started this process."""
        return bool(self.host)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> LaunchedProcess:
        """Read ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``LOCAL_WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT``.

        Raises:
            ConfigError: some of them are set and others missing, one is no number, or they contradict each other.
        """
        given = [name for name in RANK_VARIABLES if name in environ]
        if not given:
            return cls()
        for name in (*RANK_VARIABLES, *_MEETING_VARIABLES):
            if not environ.get(name, "").strip():
                state = "empty" if name in environ else f"missing although {given[0]} is set"
                raise ConfigError(f"{name}: {state}; {_HINT}")
        rank, world_size, local_rank = (_whole_number(environ, name) for name in RANK_VARIABLES)
        port = _whole_number(environ, "MASTER_PORT")
        if not 0 < world_size <= MAX_PROCESSES:
            raise ConfigError(f"WORLD_SIZE: not between 1 and {MAX_PROCESSES} (got {world_size}); {_HINT}")
        if not 0 < port <= LARGEST_PORT:
            raise ConfigError(f"MASTER_PORT: not between 1 and {LARGEST_PORT} (got {port}); give a free port of rank 0")
        # A launcher need not say how many are on a node.
        local_world_size = _whole_number(environ, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in environ else 0
        num_restarts = _whole_number(environ, _RESTARTS) if _RESTARTS in environ else 0
        larger = (
            ("RANK", rank, "WORLD_SIZE", world_size - 1),
            ("LOCAL_RANK", local_rank, "RANK", rank),
            ("LOCAL_RANK", local_rank, "LOCAL_WORLD_SIZE", (local_world_size or world_size) - 1),
            ("LOCAL_WORLD_SIZE", local_world_size, "WORLD_SIZE", world_size),
        )
        for name, value, other, most in larger:
            if value > most:
                raise ConfigError(f"{name}: {value} contradicts {other} {environ.get(other, most)}; {_HINT}")
        if "LOCAL_WORLD_SIZE" in environ and not local_world_size:
            raise ConfigError(f"LOCAL_WORLD_SIZE: 0 processes on this node; {_HINT}")
        host = environ["MASTER_ADDR"].strip()
        return cls(rank, world_size, local_rank, local_world_size or 1, host, port, num_restarts)

    def check_host(self) -> None:
        """Look up where the processes meet.

        Raises:
            ConfigError: a launcher has named a host that does not resolve.
        """
        check_host(self.host, "MASTER_ADDR")


def check_host(host: str, origin: str) -> None:
    """Look a host up.

    Args:
        host: a name or address; nothing is done for an empty one.
        origin: the variable or option that has named it.

    Raises:
        ConfigError: it does not resolve.
    """
    if not host:
        return
    try:
        socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        # A name that no resolver can be asked for is a UnicodeError with a text for developers.
        reason = error.strerror if isinstance(error, socket.gaierror) else "not a host name"
        raise ConfigError(
            f"{origin}: {_shown(host)} does not resolve ({reason}); give the name or address of the machine where "
            "the processes meet"
        ) from error


def speaks_for_node(environ: Mapping[str, str]) -> bool:
    """Whether this process should say what all ranks see alike: the first of a node, or one nothing is known of."""
    try:
        process = LaunchedProcess.from_environment(environ)
    except ConfigError:
        return True
    return process.rank == 0 or process.local_rank == 0


def _whole_number(environ: Mapping[str, str], name: str) -> int:
    text = environ[name]
    if not _WHOLE_NUMBER.fullmatch(text):
        raise ConfigError(f"{name}: not a whole number >= 0 (got {_shown(text)}); {_HINT}")
    return int(text)


def _shown(text: str) -> str:
    shown = ascii(text)
    return shown if len(shown) <= _MAX_SHOWN else shown[: _MAX_SHOWN - 3] + "..."
