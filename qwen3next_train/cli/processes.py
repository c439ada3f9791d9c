"""How many processes a command line asks for, on which nodes."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from qwen3next_train.cli.arguments import Arguments, Option
from qwen3next_train.config.error_lines import check_in_digits, show
from qwen3next_train.config.strict_yaml import plain_value
from qwen3next_train.errors import ConfigError
from qwen3next_train.launcher import LARGEST_PORT, MAX_PROCESSES, RANK_VARIABLES, LaunchedProcess

_MAX_PER_NODE = 1024
_PORT = re.compile("[0-9]{1,5}")

PER_NODE = Option("--nproc-per-node", "N", "start N processes on this machine through torchrun")
NODES = Option("--nnodes", "N", "as one of N nodes; the same line runs on each, but for --node-rank (default 1)")
NODE_RANK = Option("--node-rank", "R", "which of the nodes this is, from 0")
ENDPOINT = Option("--rdzv-endpoint", "HOST:PORT", "node 0 and a free port on it, where the nodes meet")
LAUNCH_OPTIONS = (PER_NODE, NODES, NODE_RANK, ENDPOINT)
"""What ``train`` takes besides the configuration to start processes; torchrun's names."""


@dataclass(frozen=True)
class Processes:
    """Processes to start.

    Args:
        per_node: on this node, and on every other.
        num_nodes: nodes of the run.
        node_rank: this node.
        endpoint: ``HOST:PORT`` where the nodes meet; empty for one node.
    """

    per_node: int
    num_nodes: int = 1
    node_rank: int = 0
    endpoint: str = ""

    @property
    def host(self) -> str:
        """The host of ``endpoint``, without the brackets of an IPv6 address; empty for one node."""
        return self.endpoint.rpartition(":")[0].strip("[]")

    @property
    def world_size(self) -> int:
        """Over all nodes."""
        return self.num_nodes * self.per_node


def processes_to_start(args: Arguments) -> Processes | None:
    """What the launch options ask for; None without them.

    Raises:
        ConfigError: a value that cannot be, or options that do not go together.
    """
    given = [option.name for option in LAUNCH_OPTIONS if option.name in args.options]
    if not given:
        return None
    if PER_NODE.name not in given:
        raise ConfigError(f"{given[0]}: only together with {PER_NODE.name}; give the processes of a node, or torchrun")
    per_node = _whole_number(
        args, PER_NODE, default="1", at_least=1, at_most=_MAX_PER_NODE, meaning="the processes of a node"
    )
    if started_with := [name for name in RANK_VARIABLES if name in os.environ]:
        raise ConfigError(
            f"{PER_NODE.name}: already started by a launcher ({started_with[0]} is set); leave the option out, or "
            "torchrun"
        )
    most = MAX_PROCESSES // per_node
    num_nodes = _whole_number(args, NODES, default="1", at_least=1, at_most=most, meaning="the number of nodes")
    node_rank = _whole_number(args, NODE_RANK, default="0", at_least=0, at_most=most, meaning="the number of this node")
    if node_rank >= num_nodes:
        raise ConfigError(f"{NODE_RANK.name}: {node_rank} of {num_nodes} nodes; give 0 to {num_nodes - 1}")
    if num_nodes == 1:
        return Processes(per_node)
    for option in (NODE_RANK, ENDPOINT):
        if option.name not in given:
            raise ConfigError(f"{option.name}: missing with {NODES.name} {num_nodes}; give {option.help}")
    return Processes(per_node, num_nodes, node_rank, _endpoint(args))


def world_size(args: Arguments) -> int:
    """Processes the run will have: those asked for, or those a launcher started.

    Raises:
        ConfigError: see :func:`processes_to_start`, or what a launcher says is wrong.
    """
    processes = processes_to_start(args)
    return LaunchedProcess.from_environment(os.environ).world_size if processes is None else processes.world_size


def _whole_number(args: Arguments, option: Option, *, default: str, at_least: int, at_most: int, meaning: str) -> int:
    text = args.last(option.name)
    text = default if text is None else text
    count = plain_value(text)
    check_in_digits(option.name, count, text)
    if type(count) is not int or not at_least <= count <= at_most:
        bound = f">= {at_least}" if at_least != 1 else "> 0"
        if type(count) is int and count > at_most:
            bound = f"<= {at_most}"
        raise ConfigError(f"{option.name}: not a whole number {bound} (got {show(text)}); give {meaning}")
    return count


def _endpoint(args: Arguments) -> str:
    text = args.last(ENDPOINT.name) or ""
    host, _, port = text.rpartition(":")
    if not host or not _PORT.fullmatch(port) or not 0 < int(port) <= LARGEST_PORT:
        raise ConfigError(f"{ENDPOINT.name}: not HOST:PORT (got {show(text)}); give {ENDPOINT.help}")
    return text
