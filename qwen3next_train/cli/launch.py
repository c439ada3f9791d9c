"""``--nproc-per-node N``: this process becomes torchrun, which starts N of the same command."""

from __future__ import annotations

import os
import site
import sys
from pathlib import Path
from typing import NoReturn

from qwen3next_train.cli.arguments import without_option

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
"""Forwarded to the workers. torchrun's own list lacks SIGUSR1, which would then kill it and orphan the workers."""

SHUTDOWN_TIMEOUT_S = 1800
"""How long workers may take to save after a signal. torchrun's own 30 s would kill them in the middle of it."""


def start_processes(count: int) -> NoReturn:
    """Replace this process by torchrun over ``count`` processes of the same command line, less the option."""
    sys.stdout.flush()
    sys.stderr.flush()
    command = launch_command(count, sys.argv[1:])
    os.execvpe(command[0], command, launch_environment(dict(os.environ)))


def launch_command(count: int, argv: list[str]) -> list[str]:
    """The torchrun command line for this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return [
        *launcher,
        *("--signals-to-handle", SIGNALS),
        *("-m", "qwen3next_train"),
        *without_option(argv, "--nproc-per-node"),
    ]


def launch_environment(environment: dict[str, str]) -> dict[str, str]:
    """The environment for torchrun and its workers."""
    environment.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_TIMEOUT_S))
    root = str(Path(__file__).resolve().parents[2])
    if root not in site.getsitepackages():
        # A checkout that is not installed is importable here because of where the start script lies; the
        # workers are started by module name, from the working directory.
        paths = [root, *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    return environment
