"""How many processes a command line asks for, on which nodes."""

from __future__ import annotations

import os
from dataclasses import dataclass

from qwen3next_train.cli.arguments import Arguments, Option
from qwen3next_train.config.error_lines import show
from qwen3next_train.config.strict_yaml import plain_value
from qwen3next_train.errors import ConfigError

_LARGEST_PORT = 65535

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
    per_node = _whole_number(args, PER_NODE, default="1", at_least=1, meaning="the number of processes")
    if "WORLD_SIZE" in os.environ:
        raise ConfigError(f"{PER_NODE.name}: already started by a launcher; leave the option out, or torchrun")
    num_nodes = _whole_number(args, NODES, default="1", at_least=1, meaning="the number of nodes")
    node_rank = _whole_number(args, NODE_RANK, default="0", at_least=0, meaning="the number of this node")
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
        ConfigError: see :func:`processes_to_start`.
    """
    processes = processes_to_start(args)
    return int(os.environ.get("WORLD_SIZE", "1")) if processes is None else processes.world_size


def _whole_number(args: Arguments, option: Option, *, default: str, at_least: int, meaning: str) -> int:
    text = args.last(option.name) or default
    count = plain_value(text)
    if type(count) is not int or count < at_least:
        bound = f">= {at_least}" if at_least != 1 else "> 0"
        raise ConfigError(f"{option.name}: not a whole number {bound} (got {show(text)}); give {meaning}")
    return count


def _endpoint(args: Arguments) -> str:
    text = args.last(ENDPOINT.name) or ""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) <= _LARGEST_PORT:
        raise ConfigError(f"{ENDPOINT.name}: not HOST:PORT (got {show(text)}); give {ENDPOINT.help}")
    return text
